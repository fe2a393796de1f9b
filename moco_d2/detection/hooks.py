"""Detectron2's hooks, changed for exact resuming and for runs that fail."""

from __future__ import annotations

from detectron2.engine import hooks


class RepeatablePreciseBN(hooks.PreciseBN):
    """Detectron2's precise-BN on the same pictures each time: a resumed run cannot know how many were used."""

    def update_stats(self) -> None:
        """Update the statistics."""
        self._data_iter = None
        super().update_stats()


class EvaluateIfDone(hooks.EvalHook):
    """Detectron2's hook, which does not evaluate after a failed last step.

    Detectron2's would: the metrics would be those of an unfinished detector, and the error would show hours later, or
    never if the evaluation fails, too.
    """

    def after_train(self) -> None:
        """Evaluate if all steps were taken."""
        if self.trainer.iter < self.trainer.max_iter:  # the last step's number is max_iter - 1
            self._eval_after_train = False
        super().after_train()
