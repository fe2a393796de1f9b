"""Parts for methods, in plain torch: no config, no Detectron2."""
