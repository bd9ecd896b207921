"""RabbitMQ's management API, as far as logins need it: users, permissions, connections."""

import base64
import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ops.roles import BrokerRole
from shared import tls
from shared.errors import BrokerUnavailable, SettingsError
from shared.transport.names import VHOST
from shared.urls import check_port, hide_password

ANSWER_S_MAX = 10.0
SETTING = "FEDMQ_BROKER_ADMIN_URL"


class BrokerAdmin:
    """The management API of one RabbitMQ.

    Args:
        url: https://login:password@host:15671, with the names of certificate files as any URL of ours.

    Raises:
        SettingsError: it is no such URL, or a certificate file cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.shown = hide_password(url)
        try:
            check_port(url)
            plain, files = tls.without_files(url)
            parts = urlsplit(plain)
            if parts.scheme not in ("http", "https") or not parts.hostname or not parts.username:
                raise ValueError("expected https://login:password@host:15671")
            context = tls.client_context(files) if parts.scheme == "https" else None
        except ValueError as error:
            raise SettingsError(f"{SETTING} {self.shown!r} is no URL of RabbitMQ's management API: {error}") from error
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        self._headers = {
            "Authorization": f"Basic {base64.b64encode(login).decode()}", "Content-Type": "application/json",
        }  # fmt: skip
        self._base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/api"
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def check(self) -> str:
        """Return RabbitMQ's version after making sure that the virtual host is there.

        Raises:
            BrokerUnavailable: it cannot be reached.
            SettingsError: it refuses the login, or lacks the virtual host.
        """
        overview = self._call("GET", "overview")
        if self._call("GET", f"vhosts/{_part(VHOST)}") is None:
            raise SettingsError(
                f"RabbitMQ at {self.shown} has no virtual host {VHOST!r}: load broker_config/definitions.json"
            )
        return str((overview or {}).get("rabbitmq_version", "?"))

    def put(self, role: BrokerRole, password: str) -> None:
        """Make a login, or give it another password and these permissions; connections made before stay.

        A new one may publish only at the end: never is there a moment in which its key is not pinned. One that was
        there has its former permissions until then, and keeps any on exchanges and virtual hosts not named here.
        """
        user = {"password": password, "tags": ",".join(role.tags)}
        self._call("PUT", f"users/{_part(role.login)}", user)
        for exchange, topic in role.topics.items():
            pinned = {"exchange": exchange, "write": topic.write, "read": topic.read}
            self._call("PUT", f"topic-permissions/{_part(VHOST)}/{_part(role.login)}", pinned)
        allowed = {name: getattr(role.permission, name) for name in ("configure", "write", "read")}
        self._call("PUT", f"permissions/{_part(VHOST)}/{_part(role.login)}", allowed)

    def delete(self, login: str) -> bool:
        """End a login and close its connections; tell whether there was one."""
        existed = self._call("DELETE", f"users/{_part(login)}") is not None
        self.close_connections(login)  # RabbitMQ does so by itself when it deletes; not after a crash in between
        return existed

    def close_connections(self, login: str) -> None:
        """Close the connections of a login."""
        self._call("DELETE", f"connections/username/{_part(login)}")

    def connections(self, login: str) -> list[dict[str, Any]]:
        """Return what is known of the open connections of a login."""
        found = self._call("GET", f"connections/username/{_part(login)}")
        return list(found or [])

    def exists(self, login: str) -> bool:
        """Tell whether there is such a login."""
        return self._call("GET", f"users/{_part(login)}") is not None

    def names(self) -> set[str]:
        """Return all logins."""
        return {str(user["name"]) for user in self._call("GET", "users?columns=name") or []}

    def definitions(self) -> dict[str, Any]:
        """Return what the whole broker is made of: users, permissions, exchanges, queues, bindings, policies."""
        return dict(self._call("GET", "definitions") or {})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer, {} where it is empty, None where there is no such thing."""
        given = None if body is None else json.dumps(body).encode()
        headers = self._headers | {"X-Reason": "fedmq devices"}
        request = urllib.request.Request(f"{self._base}/{path}", given, headers, method=method)  # noqa: S310
        try:
            with self._opener.open(request, timeout=ANSWER_S_MAX) as answer:
                text = answer.read()
            return json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise self._refused(error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error

    def _refused(self, error: urllib.error.HTTPError) -> SettingsError | BrokerUnavailable:
        text = error.read(1000).decode(errors="replace")
        if error.code == 401:
            return SettingsError(
                f"RabbitMQ's management API at {self.shown} refuses this login, or it has no tag `administrator`: "
                f"check {SETTING}"
            )
        if error.code >= 500:
            return BrokerUnavailable(f"RabbitMQ's management API at {self.shown}: {error.code} {text}")
        return SettingsError(f"RabbitMQ's management API at {self.shown} refuses: {error.code} {text}")

    def _unreachable(self, error: Exception) -> BrokerUnavailable:
        cause = getattr(error, "reason", error)
        reason = getattr(cause, "strerror", None) if not isinstance(cause, ssl.SSLError) else None
        mend = tls.hint(cause if isinstance(cause, BaseException) else error)
        return BrokerUnavailable(
            f"cannot reach RabbitMQ's management API at {self.shown} ({SETTING}): {reason or cause}"
            f"{mend and '; ' + mend}"
        )


def _part(name: str) -> str:
    return quote(name, safe="")
