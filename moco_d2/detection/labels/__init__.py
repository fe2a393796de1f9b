"""Labels of the user's own data sets: readers that validate them and normalise them to what Detectron2 expects."""
