"""Buckets of both stores, on servers of this machine, with faults."""

import contextlib
import dataclasses
import tempfile
import time
import types

import remote_servers
from etils import epath

from mvc_jax import object_store, store_client

KEYS = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # further tries are ours
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclasses.dataclass
class Place:
    """A folder in an empty bucket.

    Attributes:
      scheme: "s3" or "gs".
      server: `remote_servers.Server` or `remote_servers.Store`.
      folder: in the bucket.
    """

    scheme: str
    server: object
    folder: epath.Path

    def fault(self, part: str, *faults) -> None:
        self.server.faults[part] = [*faults]

    def asked(self) -> list[str]:
        """The requests since the last call."""
        asked = [*self.server.asked]
        self.server.asked.clear()
        return asked


def use(monkeypatch, scheme, url, scratch):
    """Lets clients ask a server, and not wait before they try again."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    waits = types.SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    monkeypatch.setattr(store_client, "time", waits)
    monkeypatch.setattr(object_store, "_sent", {})
    monkeypatch.setattr(store_client, "_reached", set())
    object_store._remembered.cache_clear()
    if scheme == "gs":

        async def sleep(seconds):
            pass

        monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))
    store_client._system.cache_clear()


def be_impatient(monkeypatch, scheme):
    """Lets a new client wait for half a second, where a slow server takes two."""
    monkeypatch.setattr(store_client, "_READ", 0.5)
    monkeypatch.setattr(remote_servers, "SLOW", 2.0)
    client = store_client._connect(scheme)
    monkeypatch.setattr(store_client, "_system", lambda scheme: client)


def forget():
    """As a new process, which has sent nothing."""
    object_store._sent.clear()


@contextlib.contextmanager
def place(monkeypatch, scheme, store, root, number):
    """A new bucket.

    Args:
      monkeypatch: of the test.
      scheme: of the store.
      store: a running `remote_servers.Store`.
      root: an empty folder, for scratch and the server of `gs`.
      number: of the bucket.
    """
    scratch = root / "scratch"
    scratch.mkdir()
    name = f"bucket-{number}"
    with contextlib.ExitStack() as stack:
        if scheme == "gs":
            (root / "served" / name).mkdir(parents=True)
            server = remote_servers.serve(root / "served", remote_servers.Bucket)
            store = stack.enter_context(server)
        use(monkeypatch, scheme, store.url, scratch)
        if scheme == "s3":
            if store.client is None:  # a second to make
                store.client = store_client._system("s3")
            client = store.client
            monkeypatch.setattr(store_client, "_system", lambda scheme: client)
            client.mkdir(name)
        store.asked.clear()
        try:
            yield Place(scheme, store, epath.Path(f"{scheme}://{name}/run"))
        finally:
            store.faults.clear()
            store.locked = False
            object_store._sent.clear()
