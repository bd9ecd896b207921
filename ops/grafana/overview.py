"""Is it learning, how fast, how stale, who takes part."""

from ops.grafana.panels import BLUE, GREEN, ORANGE, RED, YELLOW, Dashboard, Panel, Query
from ops.grafana.queries import (
    APPLIED,
    GOOD_AT_ZERO,
    OUTCOMES,
    J,
    mean,
    quantiles,
    rate,
    stat,
)


def evaluation(which: str) -> str:
    """Return the query of the newest evaluations; which of them, as PromQL has it."""
    return f'max by (metric) (fedmq_job_evaluation{{exported_job=~"$job",{which}}})'


ACCURACY = stat(
    "Accuracy",
    "The newest evaluation on held-out data.",
    'max(fedmq_job_evaluation{exported_job=~"$job",metric="accuracy"})',
    "percentunit",
    decimals=1,
    high=1,
    steps=((None, BLUE),),
    none="no evaluator",
)


ALERTS = 'ALERTS{alertstate="firing",severity!=""}'


DASHBOARD = Dashboard(
    "fedmq-overview",
    "FedMQ / Overview",
    "Is it learning, how fast, how stale, who takes part.",
    (
        ACCURACY,
        stat("Version", "The newest committed model.", f"max(fedmq_job_version{J})", decimals=0),
        stat(
            "Updates applied",
            "Each of them moved the model once.",
            f"sum({rate('fedmq_job_updates_total', APPLIED)})",
            "ops",
            decimals=1,
            steps=((None, RED), (0.0001, GREEN)),
        ),
        stat(
            "Staleness",
            "Mean of the updates applied lately, in versions.",
            mean("fedmq_update_staleness_versions"),
            "short",
            decimals=1,
            steps=((None, GREEN), (10, YELLOW), (50, RED)),
        ),
        stat(
            "Devices at work",
            "Clients heard of in the last 10 minutes.",
            'sum(fedmq_fleet_clients{exported_job=~"$job",seen="10m"})',
            steps=((None, RED), (1, GREEN)),
            decimals=0,
        ),
        stat(
            "Alerts firing",
            "Of all jobs; the table below names them.",
            f"count({ALERTS}) or vector(0)",
            steps=GOOD_AT_ZERO,
            decimals=0,
        ),
        Panel(
            "Is it learning?",
            "The evaluator's numbers over time; losses on the right. A curve that falls is a reason to look.",
            queries=(
                Query(evaluation('metric!~".*_class_.*|.*loss.*"'), "{{metric}}"),
                Query(evaluation('metric=~".*loss.*",metric!~".*_class_.*"'), "{{metric}} (right)", "none", "#8e8e8e"),
            ),
            unit="none",
            height=9,
        ),
        Panel(
            "How fast?",
            "Updates a second by what became of them, and new versions a minute (right).",
            queries=(
                *(
                    Query(f"sum({rate('fedmq_job_updates_total', which)})", name, color=color)
                    for name, which, color in OUTCOMES
                ),
                Query(f"60 * sum({rate('fedmq_job_version')})", "versions/min (right)", "none", "#8e8e8e"),
            ),
            unit="ops",
            stack=True,
            height=9,
        ),
        Panel(
            "How stale?",
            "Versions that came between an update's pull and its fold. Rising: devices fall behind.",
            queries=(
                Query(mean("fedmq_update_staleness_versions"), "mean"),
                *quantiles("fedmq_update_staleness_versions", 0.5, 0.9, 0.99),
            ),
            unit="none",
            width=8,
        ),
        Panel(
            "Who is there?",
            "Clients heard of within a minute, ten minutes, an hour.",
            queries=(
                Query('sum by (seen) (fedmq_fleet_clients{exported_job=~"$job",seen=~"1m|10m|1h"})', "last {{seen}}"),
            ),
            width=8,
            decimals=0,
        ),
        Panel(
            "Who contributes?",
            "Clients behind the newest commits, and the share of the busiest one (right): one decides near 100 %.",
            queries=(
                Query(f"sum(fedmq_fleet_contributors{J})", "contributors"),
                Query(f"max(fedmq_fleet_top_share{J})", "top share (right)", "percentunit", ORANGE),
            ),
            width=8,
        ),
        Panel(
            "Alerts firing",
            "What each one means and what to do: ops/guides/watch.md.",
            "table",
            (Query(ALERTS),),
            width=24,
            height=6,
            none="none: all is well",
        ),
    ),
)
