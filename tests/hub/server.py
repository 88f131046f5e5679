#!/usr/bin/env python3
"""An imitation of the Hugging Face hub on loopback, for tests: models are folders, and it misbehaves when told to.

    python3 tests/hub/server.py DIR        prints the port once it listens, and serves until DIR is removed

DIR/models/ORG/NAME/...   the repositories; DIR/pushed/ORG/NAME/... what was uploaded; DIR/log a line a request;
DIR/faults.json           read at each request; its lists are used up answer by answer, anew when the file changes:
    {"gated": ["org/name"], "private": [...], "token": "what is accepted",
     "status": {"config.json": [503, 429]}, "retry_after": "0",      of GETs of a file, or of "api", "commit", "put"
     "cut": {"model.safetensors": [1000]},                           bytes after which the connection is cut
     "lie": {"model.safetensors": 7},                                bytes by which the size is said wrong
     "corrupt": ["model.safetensors"], "no_range": true, "chunk": 40000, "refuse_lfs": "over quota",
     "hostile": ["../../escape"],                                    names that no repository has
     "hold": "model.safetensors"}                                    answers stop halfway until DIR/go is there
"""
import base64
import hashlib
import http.server
import json
import os
import re
import sys
import threading
import time
import urllib.parse

ROOT = sys.argv[1]
LOCK = threading.Lock()
STATE = {"text": None, "faults": {}}
COMMIT = re.compile("[0-9a-f]{40}")


def faults():
    try:
        with open(os.path.join(ROOT, "faults.json")) as f:
            text = f.read()
    except OSError:
        text = "{}"
    if text != STATE["text"]:
        STATE.update(text=text, faults=json.loads(text or "{}"))
    return STATE["faults"]


def next_of(kind, name):
    with LOCK:
        queue = faults().get(kind, {}).get(name)
        return queue.pop(0) if queue else None


def files_of(repo):
    top = os.path.join(ROOT, "models", repo)
    names = [os.path.relpath(os.path.join(d, n), top) for d, _, ns in os.walk(top) for n in ns]
    return {name: os.path.join(top, name) for name in sorted(names)}


def read(path):
    with open(path, "rb") as f:
        return f.read()


def commit_of(repo):
    return hashlib.sha1("".join(files_of(repo)).encode() + repo.encode()).hexdigest()


def is_large(name):
    return name.endswith((".safetensors", ".gguf", ".bin"))


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def note(self):
        with LOCK, open(os.path.join(ROOT, "log"), "a") as f:
            f.write(f"{self.command} {self.path} range={self.headers.get('Range', '')} auth={self.headers.get('Authorization', '')}\n")

    def answer(self, status, body=b"", headers=(), head=False):
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        self.send_response(status)
        names = {k.lower() for k, _ in headers}
        for key, value in headers:
            self.send_header(key, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def refuse(self, status, code=None, message=None):
        headers = [("X-Error-Code", code)] if code else []
        headers += [("X-Error-Message", message)] if message else []
        headers += [("Retry-After", faults()["retry_after"])] if "retry_after" in faults() else []
        self.answer(status, b'{"error": "refused"}', headers, head=self.command == "HEAD")

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def admits(self, repo):
        f = faults()
        good = self.token() == f.get("token", "secret")
        if repo in f.get("gated", []) and not good:
            return self.refuse(401 if not self.token() else 403, "GatedRepo", "Access to this model is restricted")
        if (repo in f.get("private", []) or not files_of(repo)) and not good:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if not files_of(repo):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        return True

    def revision(self, repo, revision):
        if not self.admits(repo):
            return
        status = next_of("status", "api")
        if status:
            return self.refuse(status)
        if revision not in ("main", "v1", "refs/pr/1", commit_of(repo)):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": n} for n in files_of(repo)]
        siblings += [{"rfilename": n} for n in faults().get("hostile", [])]
        self.answer(200, {"id": repo, "sha": commit_of(repo), "siblings": siblings})

    def resolve(self, repo, commit, name):
        if not self.admits(repo):
            return
        path = files_of(repo).get(name)
        if not path:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        status = self.command == "GET" and next_of("status", name)
        if status:
            return self.refuse(status)
        data = read(path)
        headers = [("X-Repo-Commit", commit_of(repo))]
        size = len(data) + faults().get("lie", {}).get(name, 0)
        if is_large(name):
            oid = hashlib.sha256(data).hexdigest()
            port = self.server.server_address[1]
            place = f"http://localhost:{port}/cdn/{repo}/{urllib.parse.quote(name)}"
            headers += [("X-Linked-Etag", f'"{oid}"'), ("X-Linked-Size", str(size)), ("Location", place)]
            return self.answer(302, b"", headers, head=self.command == "HEAD")
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        headers += [("ETag", f'"{oid}"')]
        if self.command == "HEAD":
            return self.answer(200, b"", headers + [("Content-Length", str(size))], head=True)
        self.send(name, data, headers)

    def cdn(self, repo, name):
        if self.headers.get("Authorization"):
            return self.refuse(400, None, "the token went to another host")
        self.send(name, read(files_of(repo)[name]), [])

    def send(self, name, data, headers):
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        end = len(data)
        if wanted and not faults().get("no_range"):
            start, status = int(wanted[1]), 206
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
            headers = headers + [("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")]
        if name in faults().get("corrupt", []):
            data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        data = data[start:end]
        cut = next_of("cut", name)
        self.send_response(status)
        for key, value in headers + [("Content-Length", str(len(data)))]:
            self.send_header(key, value)
        self.end_headers()
        if faults().get("hold") == name:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            open(os.path.join(ROOT, "held"), "w").close()
            while os.path.isdir(ROOT) and not os.path.exists(os.path.join(ROOT, "go")):
                time.sleep(0.02)
            data = data[len(data) // 2:]
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

    def do_GET(self):
        self.note()
        path = urllib.parse.unquote(self.path)
        m = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        if m and m[1] == "old/name":
            return self.answer(307, b"", [("Location", f"/api/models/org/one/revision/{m[2]}")])
        if m:
            return self.revision(m[1], m[2])
        m = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if m:
            if m[1] == "old/name":
                return self.answer(307, b"", [("Location", self.path.replace("old/name", "org/one"))], head=self.command == "HEAD")
            return self.resolve(m[1], m[2], m[3])
        m = re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path)
        if m:
            return self.cdn(m[1], m[2])
        self.refuse(404)

    do_HEAD = do_GET

    def store(self, place, data):
        path = os.path.join(ROOT, place)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def lfs(self, asked):
        port = self.server.server_address[1]
        here, chunk = f"http://127.0.0.1:{port}", faults().get("chunk")
        objects = []
        for o in asked["objects"]:
            oid, size = o["oid"], o["size"]
            one = {"oid": oid, "size": size}
            if faults().get("refuse_lfs"):
                one["error"] = {"code": 422, "message": faults()["refuse_lfs"]}
            elif not os.path.exists(os.path.join(ROOT, "lfs", oid)):
                up = {"href": f"http://localhost:{port}/bucket/{oid}", "header": {"X-Bucket": "yes"}}
                if chunk and size > chunk:
                    count = (size + chunk - 1) // chunk
                    up = {"href": f"{here}/complete/{oid}", "header": {"chunk_size": str(chunk)}}
                    up["header"].update({f"{i:05d}": f"http://localhost:{port}/part/{oid}/{i}" for i in range(1, count + 1)})
                one["actions"] = {"upload": up, "verify": {"href": f"{here}/verify"}}
            objects.append(one)
        self.answer(200, {"transfer": "multipart" if chunk else "basic", "objects": objects})

    def commit(self, repo, data):
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.store(f"pushed/{repo}/{value['path']}", base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                stored = read(os.path.join(ROOT, "lfs", value["oid"]))
                if len(stored) != value["size"]:
                    return self.refuse(400, None, "size of an LFS file")
                self.store(f"pushed/{repo}/{value['path']}", stored)
            else:
                self.store(f"pushed/{repo}.header", json.dumps(value).encode())
        self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"https://hub/{repo}/commit/{'0' * 40}"})

    def do_POST(self):
        self.note()
        data = self.body()
        path = urllib.parse.unquote(self.path)
        if self.token() != faults().get("token", "secret"):
            return self.refuse(401, None, "Invalid credentials")
        if path == "/api/repos/create":
            asked = json.loads(data)
            made = os.path.join(ROOT, "pushed", asked["organization"], asked["name"])
            if os.path.isdir(made):
                return self.refuse(409, None, "You already created this model repo")
            os.makedirs(made)
            return self.answer(200, {"url": f"https://hub/{asked['organization']}/{asked['name']}"})
        if path == "/api/validate-yaml":  # huggingface_hub asks, of a README.md
            return self.answer(200, {"errors": [], "warnings": []})
        m = re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path)
        if m:
            asked = json.loads(data)["files"]
            for f in asked:
                base64.b64decode(f["sample"], validate=True)
            return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                                                "shouldIgnore": False} for f in asked]})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs(json.loads(data))
        if path == "/verify":
            asked = json.loads(data)
            return self.answer(200 if len(read(os.path.join(ROOT, "lfs", asked["oid"]))) == asked["size"] else 422)
        m = re.fullmatch(r"/complete/(.+)", path)
        if m:
            parts = json.loads(data)["parts"]
            pieces = [read(os.path.join(ROOT, "parts", f"{m[1]}.{p['partNumber']}")) for p in parts]
            if any(p["etag"].strip('"') != hashlib.sha1(d).hexdigest() for p, d in zip(parts, pieces)):
                return self.refuse(400, None, "tags of parts")
            whole = b"".join(pieces)
            if hashlib.sha256(whole).hexdigest() != m[1]:
                return self.refuse(400, None, "checksum")
            self.store(f"lfs/{m[1]}", whole)
            return self.answer(200, {})
        m = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path)
        if m:
            status = next_of("status", "commit")
            return self.refuse(status) if status else self.commit(m[1], data)
        self.refuse(404)

    def do_PUT(self):
        self.note()
        data = self.body()
        status = next_of("status", "put")
        if status:
            return self.refuse(status)
        if self.headers.get("Authorization") or self.headers.get("Content-Type"):
            return self.refuse(403, None, "SignatureDoesNotMatch")
        m = re.fullmatch(r"/bucket/([0-9a-f]{64})", self.path)
        if m and hashlib.sha256(data).hexdigest() == m[1] and self.headers.get("X-Bucket") == "yes":
            self.store(f"lfs/{m[1]}", data)
            return self.answer(200)
        m = re.fullmatch(r"/part/([0-9a-f]{64})/(\d+)", self.path)
        if m:
            self.store(f"parts/{m[1]}.{m[2]}", data)
            return self.answer(200, b"", [("ETag", f'"{hashlib.sha1(data).hexdigest()}"')])
        self.refuse(400, None, "the bytes are not those of the name")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # a client that went away
        pass

    def service_actions(self):  # twice a second
        if not os.path.isdir(ROOT) or time.monotonic() - STARTED > 300:
            os._exit(0)


STARTED = time.monotonic()
server = Server(("127.0.0.1", 0), Hub)
if os.fork():
    print(server.server_address[1])
    sys.exit(0)
os.setsid()
for stream in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
server.serve_forever()
