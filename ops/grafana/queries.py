"""What the dashboards' queries have in common."""

from ops.grafana.panels import BLUE, GREEN, ORANGE, RED, Panel, Query

J = '{exported_job=~"$job"}'
UPDATES, DEAD = 'queue="fedmq.updates.$job"', 'queue="fedmq.dead.$job"'
RATE = "[$__rate_interval]"
GOOD_AT_ZERO = ((None, GREEN), (1, RED))
APPLIED, STALE, DUPLICATE, REJECTED = (f'outcome="{name}"' for name in ("applied", "stale", "duplicate", "rejected"))
OUTCOMES = (
    ("applied", APPLIED, GREEN), ("duplicate", DUPLICATE, BLUE), ("stale", STALE, ORANGE), ("rejected", REJECTED, RED),
)  # fmt: skip
UP = {0: ("no", RED), 1: ("yes", GREEN)}


def rate(name: str, labels: str = "") -> str:
    """Return the rate of a counter of the job; more labels as PromQL has them."""
    return f'rate({name}{{exported_job=~"$job"{"," if labels else ""}{labels}}}{RATE})'


def mean(histogram: str) -> str:
    """Return the mean of what a histogram saw lately."""
    return f"sum({rate(histogram + '_sum')}) / sum({rate(histogram + '_count')})"


def quantiles(histogram: str, *shares: float) -> tuple[Query, ...]:
    """Return a query for each share of a histogram."""
    return tuple(
        Query(f"histogram_quantile({share:g}, sum by (le) ({rate(histogram + '_bucket')}))", f"p{100 * share:g}")
        for share in shares
    )


def heat(histogram: str) -> tuple[Query, ...]:
    """Return the query of a heat map."""
    return (Query(f'sum by (le) (increase({histogram}_bucket{{exported_job=~"$job"}}{RATE}))', "{{le}}"),)


def stat(title: str, text: str, expression: str, unit: str = "short", **more: object) -> Panel:
    """Return a panel of one large number."""
    wanted = {"width": 4, "height": 4} | more
    return Panel(title, text, "stat", (Query(expression, title),), unit, **wanted)  # type: ignore[arg-type]
