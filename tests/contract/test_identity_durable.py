"""A secured Redis that is killed has everything it acknowledged: its own file loads, and so do the logins."""

import numpy as np
import pytest
import redis

from shared.model_image import ModelImage
from shared.store.redis import RedisStore
from tests.contract.stores import array, commit_of, image
from tests.secured_fixture import JOB, enrolled, secured, store, urls_of

__all__ = ["secured"]


def test_every_commit_and_every_login_outlive_a_kill_of_redis(secured, tmp_path):
    """Redis loads its file as user `default`; one without rights would lose each transaction in it without a word."""
    url = secured.url("aggregator", "store_url")
    before = RedisStore(url, JOB)
    before.check()
    before.create(image(0), 1.0)
    before.commit(commit_of(0, 1, image(1), arrays={"sum": array(2)}, applied={"cam/i/0": 0}))
    before.close()
    device = urls_of(enrolled(secured, tmp_path, "cam"))[1]
    secured.redis.kill()
    secured.redis.start()
    after = RedisStore(url, JOB)
    head = after.head()
    assert head is not None, "the job is gone"
    assert (head.revision, head.version) == (1, 1)
    stored = after.load()
    assert stored is not None
    assert dict(stored.applied) == {"cam/i/0": 0}
    np.testing.assert_array_equal(stored.arrays["sum"], array(2))
    assert after.model(1).sha256 == image(1).sha256
    after.close()
    worker = RedisStore(device, JOB)
    assert isinstance(worker.model(1), ModelImage)
    worker.close()


@pytest.mark.parametrize("login", ["default", "", None])
def test_who_gives_no_login_is_nobody_all_the_same(secured, login):
    client = store(secured, secured.url("aggregator", "store_url"))
    client.connection_pool.connection_kwargs |= {"username": login, "password": "x" if login else None}
    with pytest.raises(redis.exceptions.AuthenticationError):
        client.get("anything")
