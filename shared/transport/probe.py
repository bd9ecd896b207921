"""Whether a login may publish under a client's name, found out without publishing anything.

The broker looks at a message's permissions before its expiration, and at that before it routes it: a message whose
expiration is no number is refused with 406 by whoever may publish it, and with 403 by whoever may not.
"""

import threading
from typing import Any

import pika

from shared.errors import BrokerUnavailable, FedMQError, SettingsError
from shared.transport.link import Channel, Link, Step, parameters
from shared.transport.names import EXCHANGE, device_login, routing_key
from shared.urls import hide_password

NO_NUMBER = "probe"


def check_may_publish(url: str, job: str, client: str, timeout_s: float) -> None:
    """Return when the login of `url` may publish updates of a client.

    Args:
        url: AMQP URL.
        job: the job's id.
        client: the client's id.
        timeout_s: longest wait.

    Raises:
        SettingsError: it may not; the message says as whom it tried.
        BrokerUnavailable: the broker cannot be reached, or does not answer.
    """
    login = parameters(url, client).credentials.username
    answered, answers = threading.Event(), list[FedMQError]()

    def prepare(channel: Channel) -> list[Step]:
        def publish(callback: Any) -> None:
            """Never calls back: the channel is closed, one way or the other."""
            named = login if login in (client, device_login(job, client)) else None
            properties = pika.BasicProperties(expiration=NO_NUMBER, user_id=named)
            channel.basic_publish(EXCHANGE, routing_key(job, client), b"", properties)

        return [publish]

    def on_down(problem: FedMQError) -> None:
        answers.append(problem)
        answered.set()

    link = Link(url, f"fedmq check {client}", prepare, on_down)  # type: ignore[arg-type]
    try:
        answered.wait(timeout_s)
    finally:
        link.close()
    if not answers:
        raise BrokerUnavailable(f"RabbitMQ at {hide_password(url)} gave no answer within {timeout_s:g} s")
    said = str(answers[0])
    if ": 406 " in said and "expiration" in said:
        return
    if ": 404 " in said:
        raise FedMQError(f"{said}; the job's aggregator makes the exchange when it starts for the first time")
    if ": 403 " in said or ": 406 " in said:
        raise SettingsError(
            f"login {login!r} may not publish as client {client!r} of job {job!r}: FEDMQ_JOB and FEDMQ_CLIENT_ID must "
            f"be those it was enrolled for ({said})"
        )
    raise answers[0]
