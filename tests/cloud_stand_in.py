"""Stands in for gcloud, kubectl, sbatch, srun, scontrol and nvidia-smi.

It acts by the name under which it is called. Every call is a line of `calls.jsonl` in
the folder STAND_IN, and the part of its standard input. `plan.json` there says what is
to happen:

    create   outcomes of requests, in order: "ok", "quota", "denied", "exists",
             "login", or the states that one goes through, e.g. "FAILED"
    codes    exit codes of the training program, in order; "preempt": the machine is
             taken away, "cut": the connection breaks while it works, "long": it
             works until SIGTERM, and then exits with 75
    sbatch   "ok" or "refused";  kubectl: "ok", "nokind", "quota", "immutable"
    workers  machines of the TPU (1)
    connections  of `follow`, while `codes` has "cut": "" is one that breaks

Each worker of the TPU is a folder of its own, in which commands are run for real; the
environment that `worker.sh setup` would install is a program that plays `codes`.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(os.environ["STAND_IN"])
PLAN = json.loads((HERE / "plan.json").read_text())
WORKERS = PLAN.get("workers", 1)
WORDS = {
    "quota": "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' exceeded",
    "denied": "ERROR: PERMISSION_DENIED: The caller does not have permission",
    "login": "ERROR: (gcloud) You do not currently have an active account selected.",
    "exists": "ERROR: ALREADY_EXISTS: the queued resource already exists",
    "absent": "ERROR: NOT_FOUND: the resource was not found",
}
PROGRAM = """#!/usr/bin/env bash
echo "train: ${{*:3}}"
turns=$STAND_IN/turns-$(basename "$HOME")
turn=$(cat "$turns" 2>/dev/null || echo 0)
echo $((turn + 1)) >"$turns"
codes=({codes})
code=${{codes[turn]}}
case $code in
  preempt) echo gone >"$STAND_IN/preempted"; exit 75 ;;
  cut) until [ -e "$STAND_IN/cut" ]; do sleep 0.02; done ;;
  long) trap 'exit 75' TERM; touch "$HOME/at_work"; while :; do sleep 0.05; done ;;
  *) exit "$code" ;;
esac
"""


def main() -> int:
    name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
    text = sys.stdin.read() if name in ("sbatch", "kubectl") and piped(words) else ""
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"words": [name, *words], "input": text}) + "\n")
    return globals()[name.replace("-", "_")](words, text)


def piped(words: list[str]) -> bool:
    return "apply" in words or not any(x.startswith("logs") for x in words)


def refused(kind: str) -> int:
    print(WORDS[kind], file=sys.stderr)
    return 1


class Machine:
    """The request and its machine: states that are still to come."""

    def __init__(self):
        self.file = HERE / "machine.json"

    @property
    def states(self) -> list[str]:
        return json.loads(self.file.read_text()) if self.file.exists() else []

    @states.setter
    def states(self, states: list[str]) -> None:
        self.file.write_text(json.dumps(states))

    def state(self) -> str:
        """The current state; the next one is asked for the next time."""
        first, *rest = self.states or [""]
        if rest:
            self.states = rest
        return first


def pop(what: str, default: str) -> str:
    """The next of the planned outcomes."""
    file = HERE / f"{what}.turn"
    turn = int(file.read_text()) if file.exists() else 0
    file.write_text(str(turn + 1))
    planned = PLAN.get(what, [])
    return planned[turn] if turn < len(planned) else default


def gcloud(words: list[str], text: str) -> int:
    machine = Machine()
    gone = HERE / "preempted"
    if gone.exists() and not machine.states[0].startswith("SUSPEND"):
        machine.states = ["SUSPENDING", "SUSPENDED"]
    if words[:2] == ["config", "get-value"]:
        default = PLAN.get("defaults", {}).get(words[2], "")
        print(default)
        return 0
    if words[:2] != ["compute", "tpus"]:
        return refused("absent")
    kind, action = words[2:4]
    if kind == "queued-resources" and action == "create":
        outcome = pop("create", "ok")
        if outcome in WORDS:
            return refused(outcome)
        shutil.rmtree(HERE / "workers", ignore_errors=True)
        gone.unlink(missing_ok=True)
        last = "ACTIVE" if outcome == "ok" else outcome
        machine.states = ["WAITING_FOR_RESOURCES", "PROVISIONING", last]
        return 0
    if action == "describe":
        if not machine.states:
            return refused("absent")
        if "state.failedData" in " ".join(words):
            print("no capacity")
        elif kind == "tpu-vm":
            print("READY")
        else:
            print(machine.state())
        return 0
    if action == "delete":
        if not machine.states:
            return refused("absent")
        if not PLAN.get("undeletable"):
            gone.unlink(missing_ok=True)
            machine.states = []
        return 0
    if action == "scp":
        source = words[4]
        for number in range(WORKERS):
            home(number).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, home(number) / words[5].split(":")[1])
        return 0
    if action == "ssh":
        return ssh(words, machine)
    return refused("absent")


def home(number: int) -> pathlib.Path:
    return HERE / "workers" / str(number)


def ssh(words: list[str], machine: Machine) -> int:
    if (HERE / "preempted").exists():
        return 255
    flags = dict(x[2:].split("=", 1) for x in words[5:] if "=" in x)
    chosen = range(WORKERS) if flags["worker"] == "all" else [int(flags["worker"])]
    command = flags["command"]
    if "follow" in command and "cut" in PLAN.get("codes", []):
        if pop("connections", "") == "":
            return 255
        (HERE / "cut").touch()
    if " setup " in command:
        command = command[: command.rindex("bash ")] + "true"
    found = 0
    for number in chosen:
        home(number).mkdir(parents=True, exist_ok=True)
        environment = {"HOME": str(home(number)), "PATH": os.environ["PATH"]}
        environment["STAND_IN"] = str(HERE)
        done = subprocess.run(
            ["bash", "-c", command], cwd=home(number), env=environment, check=False
        )
        found = found or done.returncode
        if " setup " in flags["command"] and not done.returncode:
            install(number)
    if (HERE / "preempted").exists():
        return 255
    return found


def install(number: int) -> None:
    program = home(number) / "mvc_jax_env" / "bin" / "python"
    program.parent.mkdir(parents=True)
    codes = " ".join(map(str, PLAN.get("codes", [0])))
    program.write_text(PROGRAM.format(codes=codes))
    program.chmod(0o755)


def sbatch(words: list[str], text: str) -> int:
    if PLAN.get("sbatch") == "refused":
        print(
            "sbatch: error: Batch job submission failed: Invalid qos", file=sys.stderr
        )
        return 1
    print("17;cluster")
    return 0


def srun(words: list[str], text: str) -> int:
    return int(pop("codes", 0))


def scontrol(words: list[str], text: str) -> int:
    return 0


def kubectl(words: list[str], text: str) -> int:
    outcome = PLAN.get("kubectl", "ok")
    said = {
        "ok": "jobset.jobset.x-k8s.io/mvc-jax created",
        "nokind": 'error: no matches for kind "JobSet" in version "v1alpha2"',
        "quota": "Error from server (Forbidden): exceeded quota: tpus",
        "immutable": "The JobSet is invalid: field is immutable",
    }
    print(said[outcome], file=sys.stdout if outcome == "ok" else sys.stderr)
    return int(outcome != "ok")


def nvidia_smi(words: list[str], text: str) -> int:
    print("\n".join(map(str, range(PLAN.get("gpus", 4)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
