"""Servers on this machine: plain HTTP, the Hugging Face hub's protocol, and Google's.

Each serves a folder: what is in it are owners of data sets of the hub, or buckets. They
answer what fsspec's file systems ask to list and to read, a few entries a page, as the
real ones do; the hub sends readers of a file elsewhere, as the real one does. Buckets
can be written. `serve_s3` starts moto, which speaks Amazon's protocol, with the same
faults.
"""

import base64
import contextlib
import datetime
import hashlib
import http.server
import json
import pathlib
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator

PAGE = 3  # entries
SLOW = 3.0  # seconds


def next_fault(faults, request):
    """What the server does wrong with a request, "METHOD path"."""
    for part, wrong in faults.items():
        if part in request:
            return wrong.pop(0) if len(wrong) > 1 else wrong[0]
    return None


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
      url: of the server.
      asked: the path of every request.
      faults: part of "METHOD path" -> what its next answers are: a status, None for the
        usual one, "cut" for one that ends in the middle, "lost" for a connection that
        ends while the request is read, "slow" for one that takes seconds, "stalled"
        for one that does so in the middle. The last one stays.
      locked: whether it refuses everybody.
      together: how many readers of images must ask before one is answered.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: pathlib.Path, handler: type):
        super().__init__(("127.0.0.1", 0), handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.faults: dict[str, list[int | str]] = {}
        self.locked = False
        self.together: threading.Barrier | None = None
        self.parts: dict[str, list[bytes]] = {}  # of uploads that go on

    def handle_error(self, *_):
        """Clients may hang up."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for its headers' receipt

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(address.query).items()}
        self.fault = self._fault(path)
        self.body = b""
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault == "lost":
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if length:
            self.body = self.rfile.read(length)
        if self.fault == "slow":
            time.sleep(SLOW)
        if isinstance(self.fault, int):
            self.refuse(self.fault)
        else:
            if self.server.together and re.search(r"^(?!/cdn).*png$", path):
                self.server.together.wait()
            self.get(path, query)

    do_HEAD = do_POST = do_DELETE = do_PUT = do_GET

    def _fault(self, path):
        return next_fault(self.server.faults, f"{self.command} {path}")

    def refuse(self, status, code="", **headers):
        self.send(json.dumps({"error": code or "no"}).encode(), status, **headers)

    def send(self, content, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault in ("cut", "stalled"):
            half = len(content) // 2
            self.wfile.write(content[:half])
            content = content[half:] if self.fault == "stalled" else b""
            time.sleep(SLOW if content else 0)
            self.close_connection = True
        self.wfile.write(content)

    def send_part(self, content):
        """What the header Range asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.send(content)
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        last = min(last, len(content) - 1)
        where = f"bytes {first}-{last}/{len(content)}"
        self.send(content[first : last + 1], 206, Content_Range=where)

    def files(self, folder):
        """Path -> file, of all below a folder."""
        paths = sorted(folder.rglob("*"))
        return {p.relative_to(folder).as_posix(): p for p in paths if p.is_file()}


class Web(Handler):
    """A web server: pages list folders."""

    def get(self, path, query):
        place = self.server.root / path.strip("/")
        if self.server.locked:
            return self.refuse(403)
        if place.is_file():
            return self.send_part(place.read_bytes())
        if not place.is_dir():
            return self.refuse(404)
        names = [p.name + "/" * p.is_dir() for p in sorted(place.iterdir())]
        links = [f'<a href="{urllib.parse.quote(name)}">{name}</a>' for name in names]
        self.send("\n".join(links).encode(), Content_Type="text/html")


class Hub(Handler):
    """The Hugging Face hub: data sets OWNER/NAME, of one revision."""

    def get(self, path, query):
        if match := re.fullmatch(r"/cdn/(.*)", path):
            return self.send_part((self.server.root / match[1]).read_bytes())
        api = r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?"
        if match := re.fullmatch(api, path):
            name, what, revision, inside = match.groups()
        elif match := re.fullmatch(
            r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path
        ):
            name, revision, inside = match.groups()
            what = "resolve"
        else:
            return self.refuse(404, X_Error_Code="RepoNotFound")
        folder = self.server.root / name
        if self.server.locked or not folder.is_dir():
            return self.refuse(401, "Invalid username", X_Error_Code="RepoNotFound")
        if revision not in (None, "main"):
            return self.refuse(404, X_Error_Code="RevisionNotFound")
        if what == "resolve":
            if not (folder / inside).is_file():
                return self.refuse(404, X_Error_Code="EntryNotFound")
            where = urllib.parse.quote(f"/cdn/{name}/{inside}")
            return self.send(b"", 302, Location=self.server.url + where)
        if what != "tree":
            about = {"id": name, "private": False, "tags": [], "sha": "0" * 40}
            return self.send(json.dumps(about).encode())
        self.send_tree(folder / inside, folder, query)

    def send_tree(self, place, folder, query):
        if not place.is_dir():
            return self.refuse(404, X_Error_Code="EntryNotFound")
        recursive = query.get("recursive", "").lower() == "true"
        found = sorted(place.rglob("*") if recursive else place.iterdir())
        rows = []
        for p in found:
            content = b"" if p.is_dir() else p.read_bytes()
            kind = "directory" if p.is_dir() else "file"
            where = p.relative_to(folder).as_posix()
            row = {"type": kind, "path": where, "size": len(content)}
            rows.append(row | {"oid": hashlib.sha1(content).hexdigest()})
        first = int(query.get("cursor", 0))
        headers = {}
        if first + PAGE < len(rows):
            more = urllib.parse.urlencode(query | {"cursor": first + PAGE})
            base = self.path.partition("?")[0]
            headers["Link"] = f'<{self.server.url}{base}?{more}>; rel="next"'
        self.send(json.dumps(rows[first : first + PAGE]).encode(), **headers)


class Bucket(Handler):
    """Google Cloud Storage: the folders below the root are buckets."""

    def get(self, path, query):
        if self.server.locked:
            return self.refuse(401, "Anonymous caller has no storage.objects.list")
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(match[1], query)
        copied = r"/storage/v1/b/([^/]+)/o/(.*)/rewriteTo/b/([^/]+)/o/(.*)"
        if match := re.fullmatch(copied, path):
            source = self.server.root / match[1] / match[2]
            if not source.is_file():
                return self.refuse(404, "No such object")
            self.keep(match[3], match[4], source.read_bytes())
            return self.send(b'{"done": true}')
        match = re.fullmatch(
            r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path
        )
        if not match or not (self.server.root / match[1]).is_dir():
            return self.refuse(404, "The specified bucket does not exist.")
        files = self.files(self.server.root / match[1])
        if match[2] is None:
            return self.send_list(match[1], files, query)
        if match[2] not in files:
            return self.refuse(404, "No such object")
        if self.command == "DELETE":
            files[match[2]].unlink()
            return self.send(b"", 204)
        if query.get("alt") == "media":
            return self.send_part(files[match[2]].read_bytes())
        self.send(json.dumps(self.about(match[1], match[2], files[match[2]])).encode())

    def upload(self, bucket, query):
        if not (self.server.root / bucket).is_dir():
            return self.refuse(404, "The specified bucket does not exist.")
        kind = query["uploadType"]
        name, content = query.get("name"), self.body
        if kind == "multipart":
            about, content = self.body.removesuffix(b"\n--==0==--").split(b"\n\n", 2)[
                1:
            ]
            name = json.loads(about.partition(b"\n--==0==")[0])["name"]
        there = (self.server.root / bucket / name).exists()
        if query.get("ifGenerationMatch") == "0" and there:
            return self.refuse(412, "conditionNotMet")
        if kind == "resumable":  # its parts come to another address
            more = urllib.parse.urlencode({"uploadType": "part", "name": name})
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?{more}"
            return self.send(b"{}", Location=where)
        if kind == "part":
            last, size = re.fullmatch(
                r"bytes \d+-(\d+)/(\d+)", self.headers["Content-Range"]
            ).groups()
            parts = self.server.parts.setdefault(name, [])
            parts.append(content)
            if int(last) + 1 < int(size):
                return self.send(b"", 308, Range=f"bytes=0-{last}")
            content = b"".join(self.server.parts.pop(name))
        file = self.keep(bucket, name, content)
        self.send(json.dumps(self.about(bucket, name, file)).encode())

    def keep(self, bucket, name, content):
        file = self.server.root / bucket / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def about(self, bucket, name, file):
        content = file.read_bytes()
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        size = str(len(content))
        changed = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC)
        updated = changed.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        about = {"name": name, "bucket": bucket, "size": size, "md5Hash": digest}
        return about | {"updated": updated}

    def send_list(self, bucket, files, query):
        prefix, split = query.get("prefix", ""), query.get("delimiter")
        names, prefixes = [], set()
        for name in files:
            if name.startswith(prefix):
                head, slash, _ = name[len(prefix) :].partition(split or "\0")
                if split and slash:
                    prefixes.add(prefix + head + slash)
                else:
                    names.append(name)
        first = int(query.get("pageToken", 0))
        page = names[first : first + PAGE]
        answer = {
            "kind": "storage#objects",
            "items": [self.about(bucket, name, files[name]) for name in page],
            "prefixes": sorted(prefixes) if not first else [],
        }
        if first + PAGE < len(names):
            answer["nextPageToken"] = str(first + PAGE)
        self.send(json.dumps(answer).encode())


@contextlib.contextmanager
def serve(root: pathlib.Path, handler: type) -> Iterator[Server]:
    """Runs a server of a folder in threads."""
    with Server(root, handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Store:
    """Moto's server of Amazon's protocol, in threads.

    Attributes:
      url, asked, faults: as those of `Server`.
      locked: whether it refuses everybody.
    """

    def __init__(self):
        from moto.moto_server import werkzeug_app
        from werkzeug import serving

        class Quiet(serving.WSGIRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log(self, *_):
                pass

        app = werkzeug_app.create_backend_app
        self._app = werkzeug_app.DomainDispatcherApplication(app)
        options = {"threaded": True, "request_handler": Quiet}
        self.server = serving.make_server("127.0.0.1", 0, self._answer, **options)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.asked: list[str] = []
        self.faults: dict[str, list[int | str | None]] = {}
        self.locked = False
        self.client = None  # for tests to keep

    def _answer(self, environ, start):
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.asked.append(request)
        fault = next_fault(self.faults, request)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if fault == "lost":
            environ["wsgi.input"].read(length // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        if fault == "slow":
            time.sleep(SLOW)
        if self.locked or isinstance(fault, int):
            environ["wsgi.input"].read(length)
            status = 403 if self.locked else fault
            code = "AccessDenied" if status == 403 else "SlowDown"
            start(f"{status} {code}", [("Content-Type", "application/xml")])
            if environ["REQUEST_METHOD"] == "HEAD":
                return []
            return [f"<Error><Code>{code}</Code></Error>".encode()]
        answer = self._app(environ, start)
        if fault in ("cut", "stalled"):
            whole = b"".join(answer), environ["werkzeug.socket"], fault == "stalled"
            return self._halves(*whole)
        return answer

    def _halves(self, content, connection, stalled):
        yield content[: len(content) // 2]
        if stalled:
            time.sleep(SLOW)
            yield content[len(content) // 2 :]
        else:
            connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serve_s3() -> Iterator[Store]:
    """Runs moto's server, without buckets."""
    store = Store()
    thread = threading.Thread(target=store.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield store
    finally:
        store.server.shutdown()
        thread.join()
        store.server.server_close()
