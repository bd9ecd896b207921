"""Passwords of logins, and their hashes as RabbitMQ keeps them."""

import base64
import hashlib
import secrets

PASSWORD_BYTES = 24
SALT_BYTES = 4  # RabbitMQ's form; 192 random bits need no more


def new_password() -> str:
    """Return a password of 32 characters that need no escaping in a URL."""
    return secrets.token_urlsafe(PASSWORD_BYTES)


def rabbit_hash(password: str, salt: bytes | None = None) -> str:
    """Return a password's hash as RabbitMQ keeps it: base64 of salt || SHA-256(salt || password)."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def is_rabbit_hash_of(text: str, password: str) -> bool:
    """Tell whether a hash is that of a password."""
    try:
        salt = base64.b64decode(text, validate=True)[:SALT_BYTES]
    except ValueError:
        return False
    return len(salt) == SALT_BYTES and text == rabbit_hash(password, salt)
