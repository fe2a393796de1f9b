"""What happens where the packages of the eval and vit extras are missing."""

from hidden_modules import run_without


def test_missing_packages_are_named_before_a_run(tmp_path):
    code = """if True:
        from detectron2.data import MetadataCatalog
        from moco_d2.config import get_cfg
        from moco_d2.detection.metrics.coco import choose_backend
        from moco_d2.detection.metrics.evaluators import evaluator_type
        print(choose_backend("auto"))
        cfg = get_cfg()
        for kind in ("lvis", "cityscapes_instance", "cityscapes_sem_seg", "coco"):
            MetadataCatalog.get(kind).evaluator_type = kind
            cfg.TEST.COCO_BACKEND = "faster"
            try:
                evaluator_type(kind, cfg)
            except ValueError as error:
                print(error)
        from moco_d2.layers.encoders import ENCODERS
        try:
            ENCODERS["vit_tiny"].build()
        except ValueError as error:
            print(error)
        """
    done = run_without(("hotcoco", "faster_coco_eval", "lvis", "cityscapesscripts", "timm"), tmp_path, "-c", code)
    first, *errors = done.stdout.splitlines()
    assert first.startswith("pycocotools "), done.stderr
    installs = ["lvis", "cityscapesscripts", "cityscapesscripts", "faster-coco-eval", "'moco_d2[vit]'"]
    assert len(errors) == 5 and all(f"pip install {name}" in e for name, e in zip(installs, errors, strict=True))
