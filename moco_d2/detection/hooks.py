"""Detectron2's hooks, as a run needs them that resumes exactly and may fail at any step."""

from __future__ import annotations

from detectron2.engine import hooks


class RepeatablePreciseBN(hooks.PreciseBN):
    """Detectron2's precise-BN, from the same pictures each time: a resumed run does not know how many were used."""

    def update_stats(self) -> None:
        """Update the statistics."""
        self._data_iter = None
        super().update_stats()


class EvaluateIfDone(hooks.EvalHook):
    """Detectron2's hook, but for the end of a run whose last step has failed: that one would be evaluated, too.

    Its figures would be those of a detector that is not trained to the end, and the error would show hours later, or
    never where the evaluation, too, fails.
    """

    def after_train(self) -> None:
        """Evaluate, if all steps were taken."""
        if self.trainer.iter < self.trainer.max_iter:  # the last step's number is max_iter - 1
            self._eval_after_train = False
        super().after_train()
