"""Servers on this machine: plain HTTP, the Hugging Face hub's protocol, and Google's.

Each serves a folder: what is in it are owners of data sets of the hub, or buckets. They
answer what fsspec's file systems ask to list and to read, a few entries a page, as the
real ones do; the hub sends readers of a file elsewhere, as the real one does.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

PAGE = 3  # entries


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
      url: of the server.
      asked: the path of every request.
      faults: part of a path -> what its next answers are: a status, or "cut" for one
        that ends in the middle. The last one stays.
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

    def handle_error(self, *_):
        """Clients may hang up."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(address.query).items()}
        self.fault = self._fault(path)
        if isinstance(self.fault, int):
            self.refuse(self.fault)
        else:
            if self.server.together and re.search(r"^(?!/cdn).*png$", path):
                self.server.together.wait()
            self.get(path, query)

    do_HEAD = do_POST = do_GET

    def _fault(self, path):
        for part, faults in self.server.faults.items():
            if part in path:
                return faults.pop(0) if len(faults) > 1 else faults[0]
        return None

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
        if self.fault == "cut":
            content = content[: len(content) // 2]
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
        if query.get("alt") == "media":
            return self.send_part(files[match[2]].read_bytes())
        self.send(json.dumps(self.about(match[1], match[2], files[match[2]])).encode())

    def about(self, bucket, name, file):
        content = file.read_bytes()
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        size = str(len(content))
        return {"name": name, "bucket": bucket, "size": size, "md5Hash": digest}

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
