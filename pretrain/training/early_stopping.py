"""Early stopping: the end task's dev split is scored at intervals, and the run ends when the score rises no more."""

from pretrain.errors import UserError, unknown
from pretrain.evaluation.end_task import task_scores
from pretrain.evaluation.metrics import metric_names
from pretrain.training.build import Parts
from pretrain.training.engine import Engine

END_TASK = "end_task"


def check_stopping(parts: Parts) -> None:
    """Raise :class:`UserError` if early stopping has nothing to go by."""
    config, objective = parts.recipe.stopping, parts.model.objectives.get(END_TASK)
    if not config.interval_steps:
        return
    if objective is None:
        raise UserError(f"stopping.interval_steps: early stopping goes by the dev split of '{END_TASK}', which is none "
                        "of the objectives; add it or set this to 0")  # fmt: skip
    if config.metric not in (None, *(names := metric_names(objective.task.regression))):
        raise unknown("metric", config.metric, names, "stopping.metric")


class EarlyStopping:
    """Keeps the best score on dev and the step that had it; False if the recipe wants no scoring.

    Scoring is without dropout and leaves no trace in training. All ranks score, and decide by what rank 0 found.
    """

    def __init__(self, parts: Parts, engine: Engine):
        self.config, self.steps, self.engine = parts.recipe.stopping, parts.recipe.training.steps, engine
        self.objective = parts.model.objectives.get(END_TASK)
        self.best: float | None = None
        self.best_step = self.unimproved = 0
        """The step of the best score, 0 before there is one, and the scorings since then."""

    def __bool__(self) -> bool:
        return self.config.interval_steps > 0

    @property
    def metric(self) -> str:
        """What shall rise."""
        return self.config.metric or metric_names(self.objective.task.regression)[0]

    @property
    def exhausted(self) -> bool:
        """Whether the run has had its last step."""
        return bool(self) and self.unimproved >= self.config.patience

    def is_due(self, step: int) -> bool:
        """Whether the model is to be scored after ``step``."""
        return bool(self) and (step % self.config.interval_steps == 0 or step == self.steps)

    def score(self, step: int) -> dict[str, float]:
        """Score dev and take note; return metric → value, the same on all ranks, which all call it."""
        self.engine.progress.expect_long()
        values = task_scores(self.engine.module, self.objective).values
        agreed = self.engine.all_reduce([value * (self.engine.rank == 0) for value in values.values()]).tolist()
        scores = dict(zip(values, agreed, strict=True))
        if self.best is None or scores[self.metric] > self.best:
            self.best, self.best_step, self.unimproved = scores[self.metric], step, 0
        else:
            self.unimproved += 1
        return scores

    def verdict(self, step: int) -> str:
        """Say why the run ended after ``step``."""
        return (
            f"stopped early after step {step}: {self.metric} on dev has been no better than {self.best:.4f}, that of "
            f"step {self.best_step}, for {self.unimproved} scorings (stopping.patience)"
        )

    def state_dict(self) -> dict:
        """Return the best score and since when there was none better, as JSON holds them."""
        return {"best": self.best, "best_step": self.best_step, "unimproved": self.unimproved}

    def load_state_dict(self, state: dict) -> None:
        """Take up :meth:`state_dict`."""
        self.best, self.best_step, self.unimproved = state["best"], state["best_step"], state["unimproved"]
