"""The scores, during pre-training, on the end task that is one of its objectives."""

from pretrain.evaluation.metrics import Scores, score
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.end_task import EndTask


def task_scores(model: MultiObjectiveModel, objective: EndTask, split: str = "dev") -> Scores:
    """Score the model on every sample of a split, without dropout; all ranks call it, and each scores the whole."""
    training = model.training
    model.eval()
    try:
        predictions = objective.predictions(model, split)
    finally:
        model.train(training)
    return score(predictions.cpu().numpy(), objective.splits[split].labels.numpy(), objective.task.regression)
