"""The processes of one run as threads of this one.

What they tell each other is as in a real run, but for the network.
"""

import threading
import types

from mvc_jax import processes


class Store:
    """JAX's key-value store; asking fails once a process has failed."""

    def __init__(self):
        self._values, self.failed = {}, threading.Event()

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self._values
        self._values[key] = value

    def key_value_delete(self, key):
        self._values.pop(key, None)

    def key_value_dir_get(self, place):
        assert not self.failed.is_set(), "another process has failed"
        return [x for x in list(self._values.items()) if x[0].startswith(place)]


class Alone(threading.local):
    """`processes._alone` of each process: what it is in the middle of doing alone."""

    def __init__(self):
        self.names = []
        self.append, self.pop = self.names.append, self.names.pop

    def __bool__(self):
        return bool(self.names)


class Turns(threading.local):
    """`itertools.count` for each process."""

    def __init__(self):
        self.next = -1

    def __next__(self):
        self.next += 1
        return self.next


def run_together(monkeypatch, count, function):
    """Calls `function()` in each of `count` processes; raises the first one's error.

    What `processes.index()` says is what differs between them.
    """
    store, mine = Store(), threading.local()

    def state():
        return getattr(mine, "state", None)

    def process(index):
        mine.state = types.SimpleNamespace(
            process_id=index, num_processes=count, client=store
        )
        try:
            function()
        except BaseException as error:
            errors.append(error)
            store.failed.set()

    errors = []
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_state", state)
        patch.setattr(processes, "_turns", Turns())
        patch.setattr(processes, "_alone", Alone())
        patch.setattr(processes, "hosts", ["host"] * count)
        threads = [threading.Thread(target=process, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
