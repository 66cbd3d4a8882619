"""What the jobs of a sweep will cost, as `--dry-run` prints it."""

from collections.abc import Sequence

from configs.schema import ConfigError, PlanConfig, SweepConfig
from model.accounting import parameter_counts
from scripts.sweeps.jobs import Job
from scripts.sweeps.results import arm
from train.plan import Plan, make_plan
from train.plan_report import digits, duration, gigabytes, short
from train.report import table


def plan_of(config: SweepConfig, job: Job) -> Plan:
    """The plan of one job. Raises ConfigError for what training would refuse."""
    try:
        return make_plan(PlanConfig(**vars(job.run), num_gpus=config.gpus_per_job, gpu=config.gpu, mfu=config.mfu))
    except ConfigError as error:
        raise ConfigError(f"job {job.name}: {error}") from None


def markdown(config: SweepConfig, jobs: Sequence[Job], done: set[str]) -> str:
    """A row for each job, and their sum. `done`: keys of the jobs that the results have."""
    plans = [plan_of(config, job) for job in jobs]
    rows, left = [], 0.0
    for job, plan in zip(jobs, plans, strict=True):
        non_embedding, days = parameter_counts(job.run.model).non_embedding, sum(stage.days for stage in plan.stages)
        left += 0 if job.key in done else days
        rows.append(
            [
                job.name,
                arm(job.run),
                short(non_embedding),
                short(job.run.total_tokens),
                f"{job.run.total_steps:,}",
                digits(6 * non_embedding * job.run.total_tokens / 1e18),
                digits(_executed(plan)),
                gigabytes(max(stage.memory for stage in plan.stages)),
                duration(days),
                "done" if job.key in done else "to do",
            ]
        )
    total_days = sum(stage.days for plan in plans for stage in plan.stages)
    total_6nd = sum(6 * parameter_counts(job.run.model).non_embedding * job.run.total_tokens for job in jobs) / 1e18
    tokens = short(sum(job.run.total_tokens for job in jobs))
    rows.append(["all", "", "", tokens, "", digits(total_6nd), digits(sum(map(_executed, plans))), "", duration(total_days), ""])
    header = ["job", "arm", "parameters", "tokens", "steps", "6ND EFLOP", "executed EFLOP", "GB a GPU", "time", "status"]
    head = (
        f"# {config.sweep_dir}: {len(jobs)} jobs, {duration(total_days)}, of which {duration(left)} are left\n\n"
        f"{config.gpus_per_job} × {config.gpu} a job, one after the other; mfu {config.mfu:g} of its bf16 peak. Parameters "
        "without embeddings. Rows are reckoned as one document each."
    )
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    return "\n\n".join([head, table(header, rows, texts=2), *(["\n".join(["Notes:", *(f"- {note}" for note in notes)])] if notes else [])])


def _executed(plan: Plan) -> float:
    return sum(stage.flops.executed * stage.stage.steps for stage in plan.stages) / 1e18
