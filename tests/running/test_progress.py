"""The line of progress in the first step after a start."""

import pytest
from detectron2.utils.events import CommonMetricPrinter, EventStorage

from moco_d2.engine.hooks import PretrainPrinter
from moco_d2.running.progress import ProgressPrinter


@pytest.mark.parametrize("printer", [ProgressPrinter, PretrainPrinter])
def test_a_line_may_be_written_twice_before_a_step_was_timed(printer: type[CommonMetricPrinter]) -> None:
    writer = printer(100)
    with EventStorage(19) as storage:
        storage.put_scalar("total_loss", 1.0)
        writer.write()
        writer.write()  # Detectron2's own divides by zero here


def test_detectron2s_own_does_not_bear_it() -> None:
    """Where this fails, Detectron2 was mended and ours can go."""
    writer = CommonMetricPrinter(100)
    with EventStorage(19):
        writer.write()
        with pytest.raises(ZeroDivisionError):
            writer.write()
