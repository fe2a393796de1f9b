"""Data sets of the user's own: labels are read, validated and normalised to the form that Detectron2 expects."""
