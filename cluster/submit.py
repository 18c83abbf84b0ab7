"""Submit a run to a Ray cluster, follow its log, and end as it ends.

python -m raycon.cluster.submit RECIPE --storage DIR [--dotted.option value ...]
python -m raycon.cluster.submit --resume RUN_DIR
python -m raycon.cluster.submit --program raycon.tuning.sweep STUDY --dir DIR ...

What is not an option of this program (below) is the command line of the job's program, raycon.pretrain if none is named.
Exit status: that of the job; 0 succeeded, 1 failed or was stopped, 2 the request was wrong or the cluster refused it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raycon
from raycon.core.address import address_problems, is_address
from raycon.core.config import ConfigError

PRETRAIN = "raycon.pretrain"
STOP_SECONDS = 120
"""How long `ray job stop` waits for the checkpoint before it kills. Ray's own default, 3 s, may be too short for one."""
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.IGNORECASE)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Asked:
    """The request, checked."""

    address: str
    name: str
    program: str
    arguments: list[str]
    environment: dict[str, str]
    pip: list[str]
    wait: bool

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", self.program, *self.arguments])

    @property
    def run_dir(self) -> str:
        """Where the run lies; "" for programs that are no run."""
        return option(self.arguments, "--run.dir") or option(self.arguments, "--resume") or ""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status."""
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        asked, dry = parse(sys.argv[1:] if argv is None else argv)
        if dry:
            sys.stdout.write(f"{asked.entrypoint}\n")
            return 0
        return submit(asked)
    except ConfigError as error:
        if debug:
            raise
        sys.stderr.write(f"raycon.cluster.submit: {error}\n")
        return 2


# --- the request ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m raycon.cluster.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else "
                       "http://127.0.0.1:8265, where `ray dashboard cluster.yaml` puts it)")  # fmt: skip
    found.add_argument("--storage", metavar="DIR", help="a folder that every node sees, or an address (s3://...), in which the run directory is made "
                       "(default: RAYCON_STORAGE); not needed with --run.dir")  # fmt: skip
    found.add_argument("--name", help="of the job, and of its run directory in --storage (default: recipe and time)")
    found.add_argument("--program", default=PRETRAIN, help="the module to run (default: %(default)s)")
    found.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every process of the job; "
                       "no secrets: Ray shows them in its dashboard")  # fmt: skip
    found.add_argument("--pip", choices=("cpu", "gpu"), help="install the versions of constraints.txt on every node "
                       "before the job starts (minutes); default: what the nodes' image has")  # fmt: skip
    found.add_argument("--no-wait", action="store_true", help="return as soon as the job is submitted")
    found.add_argument("--dry-run", action="store_true", help="print the command the job would run, and submit nothing")
    found.add_argument("--debug", action="store_true", help="where an error came from")
    return found


def parse(argv: Sequence[str]) -> tuple[Asked, bool]:
    """The request and whether to only show it. Raises ConfigError with all that is wrong."""
    own, arguments = parser().parse_known_args(list(argv))
    problems: list[str] = []
    environment: dict[str, str] = {}
    for pair in own.env:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"--env {name}: give NAME=VALUE")
        elif SECRET.search(name):
            problems.append(f"--env {name}: Ray shows a job's environment in its dashboard and logs; set secrets in the "
                            "environment of the nodes (docs/security.md)")  # fmt: skip
        environment[name] = value
    address = own.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", address):
        problems.append(f"--address {address!r}: give the URL of the dashboard, http://HOST:8265")
    if not re.fullmatch(r"raycon(\.[a-z_]+)+", own.program):
        problems.append(f"--program {own.program!r}: give a module of raycon, raycon.tuning.sweep say")
    if not arguments:
        problems.append("give a RECIPE, --config FILE or --resume RUN_DIR")
    name = safe_name(own.name or default_name(arguments))
    if own.name and name != own.name:
        problems.append(f"--name {own.name!r}: letters, digits, . _ - only, and at most 100: {name!r}, say")
    if arguments and own.program == PRETRAIN:
        arguments, more = with_run_dir(arguments, own.storage or os.environ.get("RAYCON_STORAGE", ""), name)
        problems += more or run_problems(arguments)
    if problems:
        raise ConfigError(problems)
    pip = pinned(own.pip) if own.pip else []
    return Asked(address, name, own.program, arguments, environment, pip, not own.no_wait), own.dry_run


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, None when it is not there."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def safe_name(text: str) -> str:
    """Letters, digits, dot, underscore and minus; not at the beginning a dot or minus; at most 100."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("-._")[:100] or "run"


def default_name(arguments: Sequence[str]) -> str:
    resume, config = option(arguments, "--resume"), option(arguments, "--config")
    what = Path(resume).name if resume else Path(config).stem if config else (arguments or ["run"])[0].lstrip("-")
    return f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"


def with_run_dir(arguments: list[str], storage: str, name: str) -> tuple[list[str], list[str]]:
    """The command line with a run directory that outlives the job, and what is wrong with it."""
    given = option(arguments, "--run.dir") or option(arguments, "--resume")
    if given is None and not storage:
        return arguments, ["give --storage DIR, a folder that every node sees or an address like s3://BUCKET/RUNS (or RAYCON_STORAGE, or --run.dir): what a "
                           "job writes elsewhere goes with the job"]  # fmt: skip
    if given is None:
        arguments, given = [*arguments, "--run.dir", f"{storage.rstrip('/')}/{name}"], storage
    if is_address(given):
        return arguments, address_problems(given, "--storage" if given == storage else "--run.dir", elsewhere=True)
    if not given.startswith("/"):
        return arguments, [
            f"{given!r}: give an absolute path or an address (s3://...), the job starts in a folder of its own"
        ]
    return arguments, []


def run_problems(arguments: list[str]) -> list[str]:
    """What can be said against a command line of raycon.pretrain here; a run directory may be on the cluster alone."""
    from raycon import pretrain

    if option(arguments, "--resume"):
        return []
    file = option(arguments, "--config")
    if file and (root := checkout()) and not (root / file).is_file():
        return [f"--config {file}: no such file in {root}, which is what a job is given"]
    try:
        pretrain.parse(list(arguments))
    except ConfigError as error:
        return error.problems
    return []


def checkout() -> Path | None:
    """The folder to upload; None when raycon is installed: the nodes' own is used then."""
    root = Path(raycon.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "data_loaders").is_dir() else None


def pinned(kind: str) -> list[str]:
    """The versions raycon is tested with, without Ray (the cluster runs it already) and the other kind of faiss.

    Raises ConfigError when raycon is installed without its constraints.txt.
    """
    root = checkout()
    if root is None:
        raise ConfigError(["--pip: there is no constraints.txt beside an installed raycon; submit from a checkout"])
    other = {"cpu": "faiss-gpu", "gpu": "faiss-cpu"}[kind]
    wanted = re.compile(rf"(?!ray==|{other}==|ffcv==|lightly==|onnx)[a-z]")  # ffcv is built from source: bake it
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if wanted.match(line)]


# --- the job ----------------------------------------------------------------------------------------------------


def submit(asked: Asked) -> int:
    """Hand the job over, say how to see, stop and resume it, follow it. Raises ConfigError when it is refused."""
    client = connect(asked.address)
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **asked.environment}
    runtime: dict[str, Any] = {"env_vars": environment}
    if root := checkout():
        runtime["working_dir"] = str(root)
    if asked.pip:
        runtime["pip"] = asked.pip
    job = free_id(client, asked.name)
    give(client, job, asked, runtime)
    at = f"--address {asked.address}"
    lines = [f"job {job}: {asked.entrypoint}", f"dashboard:  {asked.address}/#/jobs/{job}"]
    lines += [f"follow:     ray job logs {at} --follow {job}", f"stop:       ray job stop {at} {job}"]
    if asked.run_dir:
        lines.append(f"resume:     python -m raycon.cluster.submit {at} --resume {shlex.quote(asked.run_dir)}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return follow(client, job, asked) if asked.wait else 0


def give(client: Any, job: str, asked: Asked, runtime: dict[str, Any], seconds: float = 180.0) -> None:
    """Submit. A head that has just started has no agent for jobs yet: it is waited for. Raises ConfigError."""
    from ray.exceptions import RayError

    end = time.monotonic() + seconds
    while True:
        try:
            client.submit_job(entrypoint=asked.entrypoint, submission_id=job, runtime_env=runtime)
            return
        except (RayError, RuntimeError, ValueError, OSError) as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                text = f"the cluster at {asked.address} did not take the job: {last_words(str(error))}"
                if "No available agent" in text:  # another Ray on the head's machine holds its agent's port
                    text += " (start the head with a --dashboard-agent-listen-port of its own?)"
                raise ConfigError([text]) from error
        time.sleep(1.0)


def connect(address: str) -> Any:
    """A client of the cluster. Raises ConfigError when there is none, it wants a token, or its Ray is another."""
    import ray
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # what is packed and passed over is no news
    try:
        client = JobSubmissionClient(address)
        there = getattr(client, "_server_ray_version", None)  # get_version() is that of the interface
    except ray.exceptions.AuthenticationError as error:
        hint = ("it wants the token of its cluster: export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or "
                "~/.ray/auth_token with the token in it (docs/clusters.md)")  # fmt: skip
        raise ConfigError([f"the cluster at {address} refused: {hint}"]) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError([f"--address {address}: no cluster answers ({last_words(str(error))}); start one, or open the way "
                           "to it: ray dashboard cluster/aws.yaml"]) from error  # fmt: skip
    if there is not None and str(there) != ray.__version__:
        raise ConfigError([f"the cluster at {address} runs Ray {there}, here is {ray.__version__}: they must be the same; "
                           f"pip install 'ray[default]=={there}' here"])  # fmt: skip
    return client


def free_id(client: Any, name: str) -> str:
    """``name``, or name-2, ... when the cluster knows a job of that name."""
    known = {job.submission_id for job in client.list_jobs()}
    number, found = 1, name
    while found in known:
        number += 1
        found = f"{name}-{number}"
    return found


def follow(client: Any, job: str, asked: Asked) -> int:
    """Print the job's log until it ends; its exit status."""
    try:
        asyncio.run(_tail(client, job))
    except KeyboardInterrupt:
        sys.stderr.write(f"\nnot following any more; job {job} goes on\n")
        return 130
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        more = f"; go on with: python -m raycon.cluster.submit --address {asked.address} --resume {asked.run_dir}"
        sys.stderr.write(f"raycon.cluster.submit: job {job} was stopped{more if asked.run_dir else ''}\n")
        return 1
    status = getattr(info, "driver_exit_code", None) or 1
    sys.stderr.write(f"raycon.cluster.submit: job {job} failed with exit status {status}: {cause(client, job, info)}\n")
    return int(status)


async def _tail(client: Any, job: str) -> None:
    """The log as it comes; a broken connection is made again and goes on where it broke."""
    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, shown - seen) :] if seen + len(text) > shown else ""
                seen += len(text)
                shown = max(shown, seen)
                sys.stdout.write(fresh)
                sys.stdout.flush()
        except (RuntimeError, OSError) as error:
            sys.stderr.write(f"(connection lost: {last_words(str(error))}; trying again)\n")
        if client.get_job_status(job) in ENDED:
            return
        await asyncio.sleep(1.0)


def cause(client: Any, job: str, info: Any) -> str:
    """The last words of the job's log; what Ray says when there are none (the job did not start)."""
    return last_words(client.get_job_logs(job) or "") or last_words(info.message or "no cause is known")


def last_words(text: str) -> str:
    """The last line that says something, without a hint at --debug."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("(--debug")]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
