"""From the queue to a durable commit."""

from ops.grafana.panels import BLUE, GREEN, RED, YELLOW, Dashboard, Panel, Query
from ops.grafana.queries import (
    RATE,
    UP,
    UPDATES,
    J,
    heat,
    quantiles,
    rate,
    stat,
)

DASHBOARD = Dashboard(
    "fedmq-pipeline",
    "FedMQ / Pipeline",
    "From the queue to a durable commit: where updates wait, and how long.",
    (
        stat(
            "Waiting in the queue",
            "Delivered ones that are not yet durable count too.",
            f"sum(rabbitmq_detailed_queue_messages{{{UPDATES}}})",
            decimals=0,
            steps=((None, GREEN), (1000, YELLOW), (10_000, RED)),
        ),
        stat(
            "Aggregators",
            "That answer Prometheus; one serves, the others stand by.",
            'sum(up{job="aggregator"})',
            decimals=0,
            steps=((None, RED), (1, GREEN)),
        ),
        stat("In the buffer", "Updates that wait for the next version.", f"max(fedmq_buffer_updates{J})", decimals=0),
        stat(
            "Since the last commit",
            "Grows while no update comes; if some wait, something is stuck.",
            f"time() - max(fedmq_last_commit_timestamp_seconds{J})",
            "s",
            decimals=0,
            steps=((None, GREEN), (120, YELLOW), (600, RED)),
        ),
        stat(
            "Created to durable, p90",
            "From the device to a commit that no crash undoes.",
            quantiles("fedmq_update_latency_seconds", 0.9)[0].expression,
            "s",
            decimals=1,
            steps=((None, GREEN), (60, YELLOW), (600, RED)),
        ),
        stat(
            "RabbitMQ takes updates",
            "No while its alarm of memory, disk or file handles is on; workers keep theirs.",
            "1 - max(rabbitmq_alarms_memory_used_watermark or rabbitmq_alarms_free_disk_space_watermark "
            "or rabbitmq_alarms_file_descriptor_limit)",
            words=UP,
            steps=((None, RED), (1, GREEN)),
        ),
        Panel(
            "Queue",
            "Ready: not yet fetched. Held: fetched, not yet durable; it goes up and down with the commits.",
            queries=(
                Query(f"sum(rabbitmq_detailed_queue_messages_ready{{{UPDATES}}})", "ready"),
                Query(f"sum(rabbitmq_detailed_queue_messages_unacked{{{UPDATES}}})", "held by the aggregator"),
            ),
            stack=True,
            decimals=0,
        ),
        Panel(
            "Messages in and out",
            "All queues of the broker. In above out for long: the queue grows.",
            queries=(
                Query(f"sum(rate(rabbitmq_global_messages_received_total{RATE}))", "received"),
                Query(f"sum(rate(rabbitmq_global_messages_delivered_total{RATE}))", "delivered"),
                Query(f"sum(rate(rabbitmq_global_messages_acknowledged_total{RATE}))", "acknowledged"),
                Query(f"sum(rate(rabbitmq_global_messages_redelivered_total{RATE}))", "redelivered"),
            ),
            unit="ops",
        ),
        Panel(
            "Decode, check and fold",
            "Time of one update in the aggregator; brighter: more of them.",
            "heatmap",
            heat("fedmq_decode_seconds"),
            "s",
            width=8,
        ),
        Panel(
            "Commit",
            "Time of one durable commit: Redis and its disk.",
            "heatmap",
            heat("fedmq_commit_seconds"),
            "s",
            width=8,
        ),
        Panel(
            "Created to durable",
            "How long an update is under way, all included.",
            queries=quantiles("fedmq_update_latency_seconds", 0.5, 0.9, 0.99),
            unit="s",
            width=8,
            log=True,
            low=None,
        ),
        Panel(
            "Buffer",
            "Updates in the open buffer; it falls to 0 with each version.",
            queries=(
                Query(f"max(fedmq_buffer_updates{J})", "in the buffer"),
                Query(f"max(fedmq_job_buffer_updates{J})", "durable"),
            ),
            width=8,
            decimals=0,
        ),
        Panel(
            "Commits",
            "Commits a second, and how busy an aggregator is with folding and committing (right).",
            queries=(
                Query(f"sum({rate('fedmq_commits_total')})", "commits/s"),
                Query(f"sum({rate('fedmq_decode_seconds_sum')})", "folding (right)", "percentunit"),
                Query(f"sum({rate('fedmq_commit_seconds_sum')})", "committing (right)", "percentunit"),
            ),
            unit="none",
            width=8,
        ),
        Panel(
            "Who serves",
            "1: the newest commit is this aggregator's own. A change is a takeover.",
            "state-timeline",
            (Query(f"max by (instance) (fedmq_serving{J})", "{{instance}}"),),
            width=8,
            words={0: ("stands by", BLUE), 1: ("serves", GREEN)},
        ),
        Panel(
            "Redis",
            "Memory it uses, and the append-only file on its disk.",
            queries=(
                Query("max(redis_memory_used_bytes)", "memory"),
                Query("max(redis_aof_current_size_bytes)", "append-only file"),
            ),
            unit="decbytes",
            width=8,
        ),
        Panel(
            "Redis and its disk",
            "Late syncs and blocked clients mean that the disk is too slow; failed calls that a login may not.",
            queries=(
                Query(f"sum(rate(redis_aof_delayed_fsync{RATE}))", "late syncs"),
                Query("max(redis_blocked_clients)", "blocked clients"),
                Query(f"sum(rate(redis_total_error_replies{RATE}))", "errors/s"),
            ),
            unit="none",
            width=8,
        ),
        Panel(
            "RabbitMQ",
            "Memory it uses and its limit: above, publishers are blocked.",
            queries=(
                Query("max(rabbitmq_process_resident_memory_bytes)", "memory"),
                Query("max(rabbitmq_resident_memory_limit_bytes)", "limit", color=RED),
            ),
            unit="decbytes",
            width=8,
        ),
    ),
)
