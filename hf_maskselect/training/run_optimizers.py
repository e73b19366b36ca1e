"""The optimizer and the schedule of a run, whoever makes them."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.optimization import Adafactor, AdafactorSchedule

from ..config import PruningConfig
from ..utils.swapped import swapped
from ..utils.wrappers import plain_model
from .optimizers import add_groups, align_moments, first_rate, plain, remove_groups, renewed
from .plan import rewound_rate
from .run import PruningRun


class RunOptimizers(Trainer):
    """A `Trainer` that plans its run, and adds the method's parameters, around whatever makes optimizer and schedule.

    A subclass may override `create_optimizer` and `create_scheduler` without `super()`, and both may be passed in or
    assigned. Trials get their optimizer from the same place.

    Attributes:
        given_optimizer: the optimizer that the user passed in or assigned; None where `create_optimizer` makes it.
    """

    args: PruningConfig
    model: PreTrainedModel
    optimizer: Any  # None until it is made
    run: PruningRun
    given_optimizer: Any = None
    ignored_keys: list[str] | None = None  # outputs that `compute_metrics` does not get, as `train` was asked
    _made_optimizer: Any = None  # the last one that `create_optimizer` made
    _made_schedule: Any = None  # the last one that `Trainer` or this class made

    def _inner_training_loop(self, *args, **kwargs):
        self.ignored_keys = kwargs.get("ignore_keys_for_eval")
        return super()._inner_training_loop(*args, **kwargs)

    def _prepare_for_training(self, max_steps: int, *args, **kwargs):
        makers = {
            "create_optimizer": self._noting(self.create_optimizer),
            "create_scheduler": self._planning(self.create_scheduler, max_steps),
        }
        with swapped(self, **makers):
            prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        align_moments(plain(self.optimizer))
        return prepared

    def _noting(self, create: Callable) -> Callable:
        """Wrap `create_optimizer`: note whether it makes the optimizer, or the user has given one."""

        def noted(*args, **kwargs):
            before = plain(self.optimizer)
            made = create(*args, **kwargs)
            self._take("optimizer", made)
            optimizer = plain(self.optimizer)
            if optimizer is not before:
                self._made_optimizer = optimizer
            self.given_optimizer = None if optimizer is self._made_optimizer else optimizer
            return self.optimizer

        return noted

    def _planning(self, create: Callable, max_steps: int) -> Callable:
        """Wrap `create_scheduler`: plan the run first, and afterwards add the method's groups if they are missing."""

        def planned(*args, **kwargs):
            self.run.make_plan(self.model, max_steps)
            made = create(*args, **kwargs)
            self._take("lr_scheduler", made)
            add_groups(plain(self.optimizer), self.run.method.parameter_groups(), self.lr_scheduler)
            return self.lr_scheduler

        return planned

    def _take(self, name: str, made: Any) -> None:
        """Assign what a method of a subclass has only returned."""
        if getattr(self, name) is None:
            setattr(self, name, made)
        if getattr(self, name) is None:
            maker = {"optimizer": "create_optimizer", "lr_scheduler": "create_scheduler"}[name]
            raise ValueError(f"{maker} of {type(self).__name__} made nothing: assign what it makes to self.{name}")

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        """Make the schedule that restarts at every level, if none is there."""
        if self.lr_scheduler is None:
            self.run.method.attach(self.model)
            used = self.optimizer if optimizer is None else optimizer
            if any(group.get("lr", 0) is None for group in used.param_groups):
                self.lr_scheduler = _schedule_without_rate(plain(used))
            else:
                add_groups(plain(used), self.run.method.parameter_groups())
                run = self.run
                if run.settings.lr_rewind and run.planned:  # else a user calls this, and `train` makes another
                    self.lr_scheduler = LambdaLR(used, rewound_rate(self.args, run.plan))
            self._created_lr_scheduler = self.lr_scheduler is not None
            self._made_schedule = super().create_scheduler(num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _take_model(self) -> bool:
        """Take a model that the user has assigned to `model` since the last run; return whether there is one."""
        model = plain_model(self.model)
        if self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False) is model:
            return False
        self.model = self.model_wrapped = model
        if plain(self.optimizer) is self._made_optimizer:  # it has the parameters of the other model
            self.optimizer = None
        return True

    def _forget_groups(self) -> None:
        """Remove the groups of the last run's method; an optimizer that had some is made anew, if it is not given."""
        optimizer, groups = plain(self.optimizer), self.run.method.parameter_groups()
        if optimizer not in (None, self._made_optimizer):
            remove_groups(optimizer, groups)
        elif groups:
            self.optimizer = None

    @property
    def peak_rate(self) -> float | None:
        """First learning rate above 0 before any schedule; None where the optimizer finds it itself."""
        return self.args.learning_rate if self.optimizer is None else first_rate(self.optimizer)

    def _fresh_optimizer(self) -> Any:
        """Make the run's own optimizer once more, for the parameters that the model has now."""
        with swapped(self, optimizer=None, lr_scheduler=None, _created_lr_scheduler=False):
            self._take("optimizer", self.create_optimizer())
            return plain(self.optimizer)

    def new_optimizer(self, learning_rate: float) -> Optimizer:
        """Make a fresh optimizer of the run's own class, groups and options, for a trial.

        Args:
            learning_rate: what the first rate above 0 becomes; the others keep their ratio to it.
        """
        optimizer = self.given_optimizer
        if optimizer is None:
            optimizer = self._fresh_optimizer()
        if optimizer is plain(self.optimizer):
            optimizer = renewed(optimizer)
        peak = first_rate(optimizer)
        assert peak is not None  # checked before the run
        for group in optimizer.param_groups:
            group["lr"] *= learning_rate / peak
        return optimizer


def _schedule_without_rate(optimizer: Optimizer) -> AdafactorSchedule:
    """Return the schedule of an optimizer that finds its rates itself.

    Raises:
        ValueError: it is not Adafactor of transformers.
    """
    if not isinstance(optimizer, Adafactor):
        raise ValueError(
            f"{type(optimizer).__name__} has no learning rate that a schedule could change: give it one, or pass "
            "your own schedule in optimizers"
        )
    return AdafactorSchedule(optimizer)
