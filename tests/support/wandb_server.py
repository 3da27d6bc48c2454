"""This W&B server on 127.0.0.1 keeps what it receives, so that tests can see what is sent over the
network.

It answers the GraphQL operations, file streams and uploads of the W&B client and agent. It can also
fail: `answer` is "well", "error" (every request gets 500) or "nothing" (requests hang). `close`
stops it.
"""

import gzip
import json
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from typing import Any, Literal

import yaml

KEY = "local-" + "k" * 40
ENTITY = "me"


@dataclass
class Run:
    """This is what the server knows about one run. history: rows in the order in which they
    arrived."""

    name: str
    project: str = ""
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    sweep: str | None = None
    # entity, jobType, notes, displayName, commit
    sent: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def column(self, metric: str) -> list[Any]:
        return [row[metric] for row in self.history if metric in row]


@dataclass
class Artifact:
    type: str
    name: str
    run: str | None  # whose output it is
    metadata: dict[str, Any]
    aliases: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False
    used: bool = False  # by a run, as its input


class WandbServer:
    def __init__(self) -> None:
        self.answer: Literal["well", "error", "nothing"] = "well"
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.sweep: dict[str, Any] = {}
        self.queue: Iterator[dict[str, Any]] = iter(())
        self.stopped: set[str] = set()  # runs that the server asks the agent to stop
        self.requests: list[str] = []
        self.released = threading.Event()
        handler = type("BoundHandler", (Handler,), {"server_state": self})
        self.http = Http(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment of a client."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    @property
    def run(self) -> Run:
        """Return the only run."""
        (run,) = self.runs.values()
        return run

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    # ------------------------------------------------------------------ answers

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        answer = getattr(self, f"_{operation}", None)
        return answer(variables) if answer else {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {
            "id": "u",
            "entity": ENTITY,
            "username": ENTITY,
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"viewer": viewer, **self._ServerFeaturesQuery(_)}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}
        }

    def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        bucket = run and {
            **_bucket(run),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "tags": run.tags,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {
            "model": {
                "id": "p",
                "name": v["project"],
                "entity": {"id": "e", "name": ENTITY},
                "bucket": bucket,
            }
        }

    def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        name = v.get("name") or v["id"].removeprefix("id-")
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(name))
        run.project, run.group = v.get("project") or run.project, v.get("groupName") or run.group
        run.tags, run.sweep = v.get("tags") or run.tags, v.get("sweep") or run.sweep
        run.sent = {
            key: v[key]
            for key in ("entity", "jobType", "notes", "displayName", "commit")
            if v.get(key)
        } | run.sent
        config = json.loads(v.get("config") or "{}")
        run.config |= {key: entry["value"] for key, entry in config.items() if key != "_wandb"}
        return {"upsertBucket": {"bucket": _bucket(run), "inserted": inserted}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/run-files/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # there is no artifact of this name and another type

    def _CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        v = v["input"]
        metadata, aliases = (
            json.loads(v["metadata"] or "{}"),
            [alias["alias"] for alias in v["aliases"]],
        )
        artifact = Artifact(
            v["artifactTypeName"], v["artifactCollectionName"], v.get("runName"), metadata, aliases
        )
        self.artifacts.append(artifact)
        identity = str(len(self.artifacts) - 1)
        sequence = {"id": "s", "latestArtifact": None}
        return {
            "createArtifact": {
                "artifact": {"id": identity, "state": "PENDING", "artifactSequence": sequence}
            }
        }

    def _CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "name": v["name"], "displayName": v["name"], "uploadHeaders": []}
        file["uploadUrl"] = f"{self.url}/artifact-manifests/{v['artifactID']}"
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _UpdateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        file = {
            "id": "f",
            "name": "m",
            "displayName": "m",
            "uploadHeaders": [],
            "uploadUrl": f"{self.url}/run-files/m",
        }
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "id": "f",
                "name": file["name"],
                "displayName": file["name"],
                "uploadUrl": f"{self.url}/artifact-files/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "storagePath": file["name"],
                "artifact": {"id": file["artifactID"]},
            }
            for file in v["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[int(v["artifactID"])].committed = True
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def _UseArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        identity = v.get("artifactID") or v["input"]["artifactID"]
        self.artifacts[int(identity)].used = True
        return {"useArtifact": {"artifact": {"id": identity}}}

    def _ArtifactByID(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(v["id"])]
        counted = {
            "versionIndex": 0,
            "size": 0,
            "fileCount": len(artifact.files),
            "ttlDurationSeconds": -1,
        }
        unknown = dict.fromkeys(("description", "historyStep", "commitHash", "updatedAt"))
        described = {
            "id": v["id"],
            "state": "COMMITTED",
            "digest": "d",
            "createdAt": "2026-01-01T00:00:00",
        }
        described |= {"ttlIsInherited": True, "tags": [], "metadata": json.dumps(artifact.metadata)}
        described |= {"artifactSequence": {"id": "s", "name": artifact.name, **_project("p")}}
        return {
            "artifact": {**described, **counted, **unknown, "artifactType": {"name": artifact.type}}
        }

    # ------------------------------------------------------------------ sweeps: a grid of `values`

    def _UpsertSweep(self, v: dict[str, Any]) -> dict[str, Any]:
        self.sweep = yaml.safe_load(v["config"])
        choices = {
            name: spec.get("values", [spec.get("value")])
            for name, spec in self.sweep["parameters"].items()
        }
        self.queue = (
            dict(zip(choices, combination, strict=True))
            for combination in product(*choices.values())
        )
        sweep = {"id": "s1", "name": "sweep001", **_project(v["projectName"])}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _SweepWithRuns(self, v: dict[str, Any]) -> dict[str, Any]:
        times = dict.fromkeys(("createdAt", "heartbeatAt", "updatedAt"), "2026-01-01T00:00:00")
        sweep = {
            "id": "s1",
            "name": "sweep001",
            "method": "grid",
            "state": "RUNNING",
            "description": "",
            **times,
        }
        sweep |= {
            "config": yaml.safe_dump(self.sweep),
            "earlyStopJobRunning": False,
            "controller": None,
        }
        return {"project": {"sweep": sweep | {"scheduler": None, "runs": {"edges": []}}}}

    def _CreateAgent(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _Heartbeat(self, v: dict[str, Any]) -> dict[str, Any]:
        """Start one run at a time."""
        busy = [run for run, active in json.loads(v.get("runState") or "{}").items() if active]
        if busy:
            commands = [{"type": "stop", "run_id": run} for run in busy if run in self.stopped]
        elif (choice := next(self.queue, None)) is not None:
            run = f"trial{sum(request == 'run' for request in self.requests)}"
            self.requests.append("run")
            args = {name: {"value": value} for name, value in choice.items()}
            commands = [
                {"type": "run", "run_id": run, "args": args, "program": self.sweep.get("program")}
            ]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    # ------------------------------------------------------------------ uploads

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Add a part of a run's files. Each part has an offset, so a part that is sent again is
        not counted twice."""
        run = self.runs[name]
        for file, part in (body.get("files") or {}).items():
            if file in ("wandb-history.jsonl", "wandb-summary.json"):
                rows = [json.loads(line) for line in part["content"] if line.strip()]
                if file == "wandb-history.jsonl":
                    run.history[part["offset"] :] = rows
                else:
                    run.summary = rows[-1]
        run.exit_code = body.get("exitcode", run.exit_code)

    def put(self, path: str, body: bytes) -> None:
        if match := re.fullmatch(r"/artifact-files/(\d+)/(.+)", path):
            self.artifacts[int(match[1])].files[match[2]] = body


def _project(name: str) -> dict[str, Any]:
    described = {"id": "p", "internalId": "p", "name": name or "uncategorized"}
    return {"project": described | {"entity": {"id": "e", "name": ENTITY}}}


def _bucket(run: Run) -> dict[str, Any]:
    config = json.dumps({key: {"value": value} for key, value in run.config.items()})
    described = {
        "displayName": run.name,
        "description": None,
        "notes": None,
        "sweepName": run.sweep,
    }
    counts = {"historyLineCount": len(run.history)}
    return {
        "id": f"id-{run.name}",
        "name": run.name,
        "config": config,
        **described,
        **counts,
        **_project(run.project),
    }


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignore a client that closes its connection early."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, answer: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        state, body = self.server_state, self._body()
        if state.answer == "error":
            return self._send({"error": "out of order"}, 500)
        if state.answer == "nothing":
            state.released.wait(60)
            self.close_connection = True
            return None
        if self.path.startswith("/graphql"):
            request = json.loads(body)
            match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            operation = match[1] if match else "Viewer"
            state.requests.append(operation)
            return self._send({"data": state.graphql(operation, request.get("variables") or {})})
        state.requests.append(self.path)
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            state.stream(match[1], json.loads(body))
            return self._send({"limits": {}})
        if self.command == "PUT":
            state.put(self.path, body)
        return self._send({})

    do_GET = do_POST = do_PUT = _handle


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()
