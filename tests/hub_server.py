"""A stand-in of the Hugging Face hub that files are pushed to, on this machine.

It keeps repositories with their commits, and large files apart, as the hub does. It
answers what huggingface_hub asks to create, to fill and to delete a repository, and can
fail at any of it.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator

import yaml

USER = "somebody"
TOKEN = "hf_writes"
LARGE = (".parquet", ".safetensors")  # stored as large files


@dataclasses.dataclass
class Repository:
    """A repository as the hub has it.

    Attributes:
      files: path -> content, of the last commit.
      commits: messages, oldest first.
      private: whether it is.
    """

    files: dict[str, bytes]
    commits: list[str]
    private: bool

    @property
    def sha(self) -> str:
        return hashlib.sha1(
            repr((self.commits, sorted(self.files))).encode()
        ).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
      repositories: (kind, "owner/name") -> what it has.
      large: sha256 -> content of a large file, in a commit or not.
      asked: method and path of every request.
      faults: a regular expression of "METHOD path" -> what the next answers to such
        requests are: a status, or 0 for none of the fault's. The last one stays.
      role: of the token.
      before: called with "METHOD path" before each answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[str, list[int]] = {}
        self.role = "write"
        self.before: Callable[[str], None] = lambda asked: None

    def handle_error(self, *_):
        """Clients may hang up."""

    def public(self) -> dict[tuple[str, str], set[str]]:
        """What everybody sees: the files of each public repository."""
        return {
            key: {*found.files} - {".gitattributes"}
            for key, found in self.repositories.items()
            if not found.private
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for its headers' receipt

    def log_message(self, *_):
        pass

    def answer(self):
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        self.server.asked.append(asked)
        self.server.before(asked)
        for pattern, statuses in self.server.faults.items():
            if re.search(pattern, asked):
                status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
                if status:
                    return self.send(status, {"error": "as the test wants it"})
        if path.startswith("/large/"):  # whose address is a secret
            self.server.large[path.removeprefix("/large/")] = body
            return self.send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        for pattern, method in _ROUTES.items():
            if match := re.fullmatch(pattern, asked):
                return method(self, *match.groups(), body)
        return self.send(404, {"error": f"no such page: {asked}"})

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def send(self, status, value, **headers):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def find(self, kind, name):
        """A repository; None, once answered, if there is none."""
        found = self.server.repositories.get((kind, name))
        if found is None:
            self.send(
                404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
        return found

    def whoami(self, body):
        role = {"displayName": "of the test", "role": self.server.role}
        orgs = [
            {"name": "lab", "roleInOrg": "write"},
            {"name": "readers", "roleInOrg": "read"},
        ]
        auth = {"type": "access_token", "accessToken": role}
        self.send(200, {"name": USER, "type": "user", "orgs": orgs, "auth": auth})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        key = (asked.get("type") or "model", name)
        if key in self.server.repositories:
            return self.send(409, {"error": "You already created this repo"})
        made = Repository({".gitattributes": b""}, ["initial commit"], asked["private"])
        self.server.repositories[key] = made
        self.send(200, {"url": f"{self.server.url}/{name}"})

    def delete(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if self.find(asked.get("type") or "model", name):
            del self.server.repositories[asked.get("type") or "model", name]
            self.send(200, {})

    def info(self, kind, name, body):
        if found := self.find(kind, name):
            card = found.files.get("README.md", b"---\n---").decode().split("---")[1]
            about = {"id": name, "private": found.private, "sha": found.sha}
            about["tags"] = (yaml.safe_load(card) or {}).get("tags", [])
            about["siblings"] = [{"rfilename": path} for path in found.files]
            self.send(200, about)

    def settings(self, kind, name, body):
        if found := self.find(kind, name):
            found.private = json.loads(body)["private"]
            self.send(200, {})

    def validate(self, body):
        content = json.loads(body)["content"].split("---")[1]
        good = isinstance(yaml.safe_load(content), dict)
        errors = [] if good else [{"message": "no metadata"}]
        self.send(200 if good else 400, {"errors": errors, "warnings": []})

    def preupload(self, kind, name, body):
        if not (found := self.find(kind, name)):
            return
        rows = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            content = found.files.get(file["path"])
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | {"oid": None if content is None else _oid(content, mode)})
        self.send(200, {"files": rows})

    def batch(self, folder, name, body):
        if not self.find("dataset" if folder else "model", name):
            return
        rows = []
        for row in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/large/{row['oid']}"}
            there = row["oid"] in self.server.large
            rows.append(row | ({} if there else {"actions": {"upload": upload}}))
        self.send(200, {"transfer": "basic", "objects": rows})

    def commit(self, kind, name, body):
        if not (found := self.find(kind, name)):
            return
        rows = [json.loads(line) for line in body.splitlines()]
        changed, header = dict(found.files), rows[0]["value"]
        if header.get("parentCommit", found.sha) != found.sha:
            return self.send(412, {"error": "A commit has happened since"})
        for row in rows[1:]:
            path = row["value"]["path"]
            if row["key"] == "file":
                changed[path] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                changed[path] = self.server.large[row["value"]["oid"]]
            else:
                del changed[path]
        found.files = changed
        found.commits.append(header["summary"])
        url = f"{self.server.url}/{name}/commit/{found.sha}"
        self.send(200, {"commitUrl": url, "commitOid": found.sha})


def _oid(content, mode):
    """As Git, or Git LFS, names a file."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


_OF = r"/api/(dataset|model)s/([^/]+/[^/]+)"
_ROUTES = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/repos/create": _Handler.create,
    "DELETE /api/repos/delete": _Handler.delete,
    "POST /api/validate-yaml": _Handler.validate,
    f"GET {_OF}(?:/revision/main)?": _Handler.info,
    f"PUT {_OF}/settings": _Handler.settings,
    f"POST {_OF}/preupload/main": _Handler.preupload,
    f"POST {_OF}/commit/main": _Handler.commit,
    r"POST /(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.batch,
}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a server in threads."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
