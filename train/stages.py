"""Where a step lies in the run: its stage, its tokens, and the model settings that go with it."""

from dataclasses import dataclass

from configs.schema import RunConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """One optimizer step of the run, counted from 0, in stage `index`, which began with `first_step`."""

    step: int
    index: int
    stage: StageConfig
    first_step: int
    tokens_before: int
    """Tokens that all earlier steps trained on."""

    @property
    def is_switch(self) -> bool:
        """True on the first step of a stage other than the first."""
        return self.index > 0 and self.step == self.first_step


def place_of(run: RunConfig, step: int) -> Place:
    """The place of a step; the step after the last one belongs to the last stage."""
    first_step = tokens = 0
    for index, stage in enumerate(run.stages):
        if step < first_step + stage.steps or index == len(run.stages) - 1:
            tokens_before = tokens + (step - first_step) * stage.batch_tokens
            return Place(step=step, index=index, stage=stage, first_step=first_step, tokens_before=tokens_before)
        first_step += stage.steps
        tokens += stage.steps * stage.batch_tokens
    raise AssertionError("a run has at least one stage")
