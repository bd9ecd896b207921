"""The devices."""

from ops.grafana.panels import BLUE, GREEN, ORANGE, RED, YELLOW, Dashboard, Panel, Query
from ops.grafana.queries import (
    GOOD_AT_ZERO,
    J,
    mean,
    quantiles,
    rate,
    stat,
)

PLAIN = f"4 * max(fedmq_model_parameters{J})"  # bytes of an update or a model without any codec


SAVED_UP = f"1 - {mean('fedmq_update_bytes')} / ({PLAIN})"


SAVED_DOWN = f"1 - sum({rate('fedmq_worker_pulled_bytes_total')}) / (sum({rate('fedmq_worker_pulls_total')}) * {PLAIN})"


BEHIND = {
    "0": "#37872D", "1": "#73BF69", "2-3": "#C8F2C2", "4-10": "#FADE2A", "11-30": "#FF9830", "31-100": "#F2495C",
    "over 100": "#C4162A",
}  # fmt: skip


DASHBOARD = Dashboard(
    "fedmq-fleet",
    "FedMQ / Fleet",
    "The devices: who is there, which version they train from, what they send.",
    (
        stat(
            "Heard of in 10 minutes",
            "Clients of which an update came, whatever became of it.",
            'sum(fedmq_fleet_clients{exported_job=~"$job",seen="10m"})',
            decimals=0,
            steps=((None, RED), (1, GREEN)),
        ),
        stat(
            "Ever",
            "Clients the store knows.",
            'sum(fedmq_fleet_clients{exported_job=~"$job",seen="ever"})',
            decimals=0,
            width=3,
        ),
        stat("Enrolled", "Devices with a login, not revoked.", f"sum(fedmq_devices_enrolled{J})", decimals=0, width=3),
        stat(
            "Never heard",
            "Enrolled, and no update ever came.",
            f"sum(fedmq_devices_never_heard{J})",
            decimals=0,
            width=3,
        ),
        stat(
            "Silent",
            "Enrolled, heard of once, and not for a day (FEDMQ_SILENT_S).",
            f"sum(fedmq_devices_silent{J})",
            decimals=0,
            width=3,
            steps=GOOD_AT_ZERO,
        ),
        stat(
            "Busiest device",
            "Its share of the newest commits.",
            f"max(fedmq_fleet_top_share{J})",
            "percentunit",
            decimals=0,
            steps=((None, GREEN), (0.5, YELLOW), (0.8, RED)),
        ),
        stat("Saved on the way up", "Against float32 without a codec.", SAVED_UP, "percentunit", decimals=0, low=None),
        Panel(
            "Last seen",
            "Clients heard of within a time: the lines part when devices stay away.",
            queries=(Query(f"sum by (seen) (fedmq_fleet_clients{J})", "{{seen}}"),),
            decimals=0,
        ),
        Panel(
            "Versions in use",
            "Clients of the last hour by how many versions behind the head they trained; red ones are far behind.",
            queries=tuple(
                Query(f'sum(fedmq_fleet_clients_behind{{exported_job=~"$job",behind="{behind}"}})', behind, color=color)
                for behind, color in BEHIND.items()
            ),
            stack=True,
            decimals=0,
        ),
        Panel(
            "Training",
            "One local training on a device; only workers that Prometheus reaches.",
            queries=quantiles("fedmq_worker_train_seconds", 0.5, 0.9),
            unit="s",
            width=8,
            log=True,
            low=None,
        ),
        Panel(
            "Outbox",
            "Finished updates that no broker has confirmed. Above 0 for long: no way to the broker, or it is full.",
            queries=(
                Query(f"max(fedmq_worker_outbox_updates{J})", "fullest"),
                Query(f"sum(fedmq_worker_outbox_updates{J})", "all"),
            ),
            width=8,
            decimals=0,
        ),
        Panel(
            "Published",
            "What became of publishes.",
            queries=(Query(f"sum by (outcome) ({rate('fedmq_worker_published_total')})", "{{outcome}}"),),
            unit="ops",
            width=8,
            stack=True,
        ),
        Panel(
            "Bytes",
            "Sent and pulled by workers.",
            queries=(
                Query(f"sum({rate('fedmq_worker_sent_bytes_total')})", "sent", color=ORANGE),
                Query(f"sum({rate('fedmq_worker_pulled_bytes_total')})", "pulled", color=BLUE),
            ),
            unit="Bps",
            width=8,
        ),
        Panel(
            "Saved against float32",
            "Of the bytes that plain weights would take. A small model's envelope can cost more than it saves.",
            queries=(Query(SAVED_UP, "up"), Query(SAVED_DOWN, "down")),
            unit="percentunit",
            width=8,
            low=None,
            high=1,
        ),
        Panel(
            "Pulls",
            "How the weights came: whole models, snapshots or deltas.",
            queries=(Query(f"sum by (how) ({rate('fedmq_worker_pulls_total')})", "{{how}}"),),
            unit="ops",
            width=8,
            stack=True,
        ),
        Panel(
            "Trouble on devices",
            "Trainings without an update, refused updates taken back, pulls of another hash than announced.",
            queries=(
                Query(f"sum({rate('fedmq_worker_task_failures_total')})", "task failures", color=RED),
                Query(f"sum({rate('fedmq_worker_returned_total')})", "taken back", color=ORANGE),
                Query(f"sum({rate('fedmq_worker_downlink_mismatches_total')})", "other hash"),
            ),
            unit="ops",
        ),
        Panel(
            "Not sent yet",
            "L2 norm of what error feedback keeps on a device; it should level off.",
            queries=(
                Query(f"max(fedmq_worker_residual_norm{J})", "largest"),
                Query(f"avg(fedmq_worker_residual_norm{J})", "mean"),
            ),
            unit="none",
        ),
    ),
)
