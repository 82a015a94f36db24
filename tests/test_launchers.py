"""The launchers, with stand-ins for the clouds' clients that record what is asked."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

LAUNCH = ROOT / "launch"
CLIENTS = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "nvidia-smi")
TRAIN = ("--config=configs/cifar100.py", "--workdir=gs://bucket/it's")
PLACE = ("--zone=us-central1-a", "--project=lab")
POLL = "--poll=0.01"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *ROOT.glob("benchmarks/*.sh")])


def installed(name):
    """A linter of the extra `dev`."""
    found = shutil.which(name, path=pathlib.Path(sys.executable).parent)
    assert found, f"no {name}: bash launch/test.sh installs it"
    return found


def test_scripts_are_clean():
    done = subprocess.run(
        [installed("shellcheck"), "-x", *SCRIPTS],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_image_is_clean_and_its_user_is_not_root():
    file = LAUNCH / "Dockerfile"
    done = subprocess.run([installed("hadolint"), file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    users = re.findall(r"^USER (\S+)", text, re.M)
    assert users and users[-1] not in ("root", "0")
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    for copied in re.findall(r"^COPY --chown=\S+ (.*) \S+$", text, re.M):
        for path in copied.split():
            assert list(ROOT.glob(path)), path
            assert f"!{path.split('/')[0]}" in ignored


class Cloud:
    """Runs launchers beside the stand-ins; keeps what they were asked."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        python = os.path.realpath(sys.executable)
        text = (ROOT / "tests" / "cloud_stand_in.py").read_text()
        for name in CLIENTS:
            client = folder / "bin" / name
            client.write_text(f"#!{python} -IS\n{text}")
            client.chmod(0o755)
        self.plan()

    def plan(self, **plan):
        (self.folder / "plan.json").write_text(json.dumps(plan))

    @property
    def environment(self):
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        # A stand-in for the program, in an environment that counts as installed.
        return kept | {"PATH": path, "STAND_IN": str(self.folder), "EXTRAS": ""}

    def launch(self, script, *words, code=0, **environment):
        done = subprocess.run(
            ["bash", LAUNCH / script, *words],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        self.said = done.stderr
        return done.stdout

    @property
    def calls(self):
        file = self.folder / "calls.jsonl"
        rows = file.read_text().splitlines() if file.exists() else []
        return [json.loads(row) for row in rows]

    @property
    def actions(self):
        """Of the TPU client: create, delete, scp, and what was run by ssh."""
        found = []
        for row in self.calls:
            words = row["words"]
            if words[:3] != ["gcloud", "compute", "tpus"] or words[4] == "describe":
                continue
            command = next((x for x in words if x.startswith("--command=")), "")
            called = re.findall(r"worker\.sh (\w+)", command)
            found.append(called[-1] if called else words[4])
        return found


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def one_sentence(text):
    (line,) = (x for x in text.strip().splitlines() if not x.startswith("launch: "))
    assert re.match(r".+: wanted .+, got .+\. .+", line), line
    return line


def babysat(cloud, *flags, code=0):
    words = ("babysit", *PLACE, POLL, *flags, "--", *TRAIN)
    return cloud.launch("tpu_vm.sh", *words, code=code)


WHOLE = ["create", "idle", "scp", "setup", "start", "follow", "wait"]


def test_a_machine_is_made_used_and_deleted(cloud):
    cloud.plan(workers=2)
    out = babysat(cloud, "--type=v5e-16", "--spot", "--delete")
    assert cloud.actions == [*WHOLE, "delete"]
    assert (
        out.count("train: --config=configs/cifar100.py --workdir=gs://bucket/it's") == 1
    )
    assert "is deleted" in cloud.said and "until:" not in cloud.said
    (create,) = (x["words"] for x in cloud.calls if "create" in x["words"])
    wanted = {
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
    }
    assert wanted | {"--spot", "--node-id=mvc-jax", *PLACE} <= {*create}
    for number in "01":
        home = cloud.folder / "workers" / number
        assert (home / "mvc_jax" / "mvc_jax" / "train.py").exists()
        assert (home / "mvc_jax_run" / "code").read_text() == "0\n"


def test_a_machine_that_is_taken_away_is_made_again(cloud):
    cloud.plan(codes=["preempt", 75, 0])
    babysat(cloud)
    again = ["start", "follow", "wait"]
    # What a preempted machine's last connection finds is not waited for.
    assert cloud.actions == [*WHOLE[:-1], "delete", *WHOLE, *again]
    assert "SUSPENDED; it is made again" in cloud.said
    assert "delete --name=mvc-jax --zone=us-central1-a --project=lab" in cloud.said


def test_a_connection_that_is_lost_leaves_the_run_alone(cloud):
    cloud.plan(codes=["cut", 2], connections=["", "lasts"])
    babysat(cloud)
    assert cloud.actions == [*WHOLE[:-1], "start", "follow", "wait"]
    assert "the run goes on" in cloud.said and "it runs already" in cloud.said


@pytest.mark.parametrize("code", [2, 1])
def test_an_error_of_the_run_ends_it_and_what_costs_is_named(cloud, code):
    cloud.plan(codes=[code, 0])
    babysat(cloud, code=code)
    assert cloud.actions == WHOLE
    assert "costs money until: bash launch/tpu_vm.sh delete" in cloud.said


def test_stopped_it_saves_and_says_75(cloud):
    cloud.plan(codes=["long"])
    for action in ("create", "setup"):
        cloud.launch("tpu_vm.sh", action, *PLACE, POLL)
        assert "costs money until:" in cloud.said
    words = ["bash", LAUNCH / "tpu_vm.sh", "run", *PLACE, "--", *TRAIN]
    run = subprocess.Popen(words, env=cloud.environment, stdout=subprocess.PIPE)
    at_work = cloud.folder / "workers" / "0" / "at_work"
    wait_for(at_work.exists)
    cloud.launch("tpu_vm.sh", "setup", *PLACE, code=2)
    assert "got a run that is at work" in cloud.said
    other = [*TRAIN, "--config.seed=1"]
    cloud.launch("tpu_vm.sh", "run", *PLACE, "--", *other, code=2)
    assert "nothing else at work" in cloud.said
    cloud.launch("tpu_vm.sh", "stop", *PLACE, code=75)
    assert run.wait(20) == 75
    run.stdout.close()
    cloud.launch("tpu_vm.sh", "logs", *PLACE, code=75)


def wait_for(condition):
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (
            "quota",
            "quota: wanted room for v5litepod-8 in us-central1-a, got .*RESOURCE",
        ),
        ("denied", "lab: wanted an account that may use Cloud TPU, got .*DENIED"),
        ("login", "gcloud: wanted credentials, got .* Run gcloud auth login"),
    ],
)
def test_a_request_that_is_refused_is_a_sentence_and_leaves_nothing(
    cloud, outcome, words
):
    cloud.plan(create=[outcome])
    babysat(cloud, code=2)
    assert re.search(words, one_sentence(cloud.said))
    assert "until:" not in cloud.said


def test_requests_that_fail_are_repeated_thrice(cloud):
    cloud.plan(create=["FAILED"] * 4)
    babysat(cloud, code=2)
    assert cloud.actions == ["create", "delete", "create", "delete", "create"]
    assert "3 failed requests: no capacity" in one_sentence(cloud.said)
    assert "until:" in cloud.said  # the last request is there still
    cloud.launch("tpu_vm.sh", "create", *PLACE, POLL, code=2)
    assert "got a request that failed: no capacity" in cloud.said


def test_what_cannot_be_deleted_is_named(cloud):
    cloud.plan(undeletable=True)
    cloud.launch("tpu_vm.sh", "create", *PLACE, POLL)
    cloud.launch("tpu_vm.sh", "delete", *PLACE, code=2)
    assert "wanted it to be deleted, got the state ACTIVE" in cloud.said
    assert "costs money until" in cloud.said


def test_place_and_type_come_from_flags_the_environment_or_the_client(cloud):
    cloud.plan(defaults={"compute/zone": "europe-west4-b", "core/project": "mine"})
    cloud.launch("tpu_vm.sh", "create", POLL, TPU_TYPE="v5p-8", TPU_SPOT="1")
    (create,) = (x["words"] for x in cloud.calls if "create" in x["words"])
    assert {"--zone=europe-west4-b", "--project=mine", "--spot"} <= {*create}
    assert {"--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"} <= {*create}
    cloud.plan()
    cloud.launch("tpu_vm.sh", "delete", code=2)
    assert "neither a flag nor a default of gcloud" in one_sentence(cloud.said)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu_vm.sh", ["destroy"], "tpu_vm.sh: wanted create, setup, "),
        ("tpu_vm.sh", ["create", "--typ=v5e-8"], "--typ=v5e-8: wanted a flag"),
        ("tpu_vm.sh", ["create", "--type=v9-8"], "--type: wanted v2, v3, v4, v5e"),
        ("tpu_vm.sh", ["create", "--name=My_TPU"], "--name: wanted lower-case"),
        ("tpu_vm.sh", ["run", *PLACE], "run: wanted flags of mvc_jax.train"),
        (
            "tpu_vm.sh",
            ["babysit", *PLACE, "--", "--workdir=runs/a"],
            "--workdir: wanted",
        ),
        ("slurm.sh", ["--gpus=x", "--", "a"], "--gpus: wanted a whole number"),
        ("slurm.sh", ["--nodes=2"], "slurm.sh: wanted flags of mvc_jax.train"),
        ("gpu.sh", ["--processes=3", "--gpus=0,1", "--", "a"], "--processes: wanted"),
        ("gpu.sh", ["--processes=0", "--", "a"], "--processes: wanted a whole number"),
        ("gke/run.sh", ["apply", "--type=b100", "--", "a"], "--type: wanted a TPU"),
        ("gke/run.sh", ["apply", "--type=v5e-7", "--", "a"], "--type: wanted a slice"),
        ("gke/run.sh", ["apply", "--type=h100", "--", "a"], "--image: wanted an image"),
        ("gke/run.sh", ["remove"], "gke/run.sh: wanted apply, logs, status or delete"),
    ],
)
def test_a_wrong_flag_is_named_and_nothing_is_asked(cloud, script, words, message):
    cloud.launch(script, *words, code=2)
    assert one_sentence(cloud.said).startswith(message)
    assert not cloud.calls


@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        (
            "tpu_vm.sh",
            ["babysit", "--delete", *PLACE, "--", *TRAIN],
            ["queued-resources create", "scp", "setup tpu gcs", "worker.sh start",
             "worker.sh follow", "queued-resources delete"],
        ),
        ("slurm.sh", ["--", *TRAIN], ["prepare_env", "sbatch", "srun", "scontrol req"]),
        ("gpu.sh", ["--gpus=0,1", "--processes=2", "--", *TRAIN], ["--process_id=1"]),
        (
            "gke/run.sh",
            ["apply", "--type=v5e-16", "--image=x/y", "--", *TRAIN],
            ["kubectl apply -f -", "gke-tpu-topology: 4x4"],
        ),
    ],
)  # fmt: skip
def test_a_dry_run_prints_every_command_and_runs_none(cloud, script, words, shown):
    at = words.index("--")
    out = cloud.launch(script, *words[:at], "--dry-run", *words[at:])
    places = [out.index(text) for text in shown]
    assert places == sorted(places)
    assert not cloud.calls


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (2, False)])
def test_a_job_is_requeued_at_75_alone(cloud, code, requeued):
    flags = ("--nodes=2", "--sbatch=--partition=a100", "--dry-run")
    printed = cloud.launch("slurm.sh", *flags, "--", *TRAIN)
    _, command, script = printed.split("\n", 2)
    for flag in (
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--signal=TERM@300",
        "--requeue",
        "--partition=a100",
    ):
        assert flag in command.split()
    cloud.plan(codes=[code])
    done = subprocess.run(
        ["bash", "-c", script],
        env=cloud.environment | {"SLURM_JOB_ID": "17"},
        capture_output=True,
    )
    srun, *others = (x["words"] for x in cloud.calls)
    assert srun[-2:] == [*TRAIN]
    assert others == ([["scontrol", "requeue", "17"]] if requeued else [])
    assert done.returncode == (0 if requeued else code)


JOBSETS = {
    "v5e-8": ("google.com/tpu", 8, 1),
    "v5e-16": ("google.com/tpu", 4, 4),
    "v5p-8": ("google.com/tpu", 4, 1),
    "v6e-64": ("google.com/tpu", 4, 16),
    "h100": ("nvidia.com/gpu", 8, 2),
}


@pytest.mark.parametrize("type_", JOBSETS)
def test_a_jobset_has_its_machines_and_says_which_codes_restart(cloud, type_):
    resource, chips, nodes = JOBSETS[type_]
    flags = [f"--type={type_}", "--image=x/y", "--nodes=2", "--account=runner"]
    train = [*TRAIN, '--config.report.title=a "b" \\ $(c)']
    cloud.launch("gke/run.sh", "apply", *flags, "--", *train)
    assert "delete --name=mvc-jax" in cloud.said
    (row,) = cloud.calls
    assert row["words"] == ["kubectl", "apply", "-f", "-"]
    found = yaml.safe_load(row["input"])
    assert "{{" not in row["input"]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == nodes
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == "runner"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {resource: chips}
    sent = [x.replace("$$", "$") for x in container["args"][: len(train)]]
    assert sent == train
    if type_ == "h100":
        assert container["args"][len(train) :] == [
            "--coordinator=mvc-jax-workers-0-0.mvc-jax:8476",
            "--num_processes=2",
            "--process_id=$(PROCESS)",
        ]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and 75 not in rule["onExitCodes"]["values"]
    assert job["backoffLimit"] == 0 and found["spec"]["failurePolicy"]["maxRestarts"]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("nokind", "cluster: wanted JobSet"),
        ("quota", "quota: wanted room for 1 pods of v5e-8"),
        ("immutable", "mvc-jax: wanted a name that is free"),
    ],
)
def test_a_jobset_that_is_refused_is_a_sentence(cloud, outcome, message):
    cloud.plan(kubectl=outcome)
    flags = ["--type=v5e-8", "--image=x/y", "--", *TRAIN]
    cloud.launch("gke/run.sh", "apply", *flags, code=2)
    assert one_sentence(cloud.said).startswith(message)


@pytest.fixture
def on_gpus(cloud):
    """`gpu.sh` in an environment that counts as installed, with a program of a line."""

    def start(program, *words):
        stand_in = cloud.folder / "env" / "bin" / "python"
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f"#!/usr/bin/env bash\n{program}\n")
        stand_in.chmod(0o755)
        text = (LAUNCH / "gpu.sh").read_text().replace("step prepare_env\n", "")
        assert "prepare_env\n" not in text
        script = cloud.folder / "gpu.sh"
        script.write_text(text.replace("here=$(cd", f"here={LAUNCH} unused=$(cd"))
        return subprocess.Popen(
            ["bash", script, *words, "--", *TRAIN],
            env=cloud.environment | {"VENV": str(cloud.folder / "env")},
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def test_processes_of_one_machine_share_its_gpus(cloud, on_gpus):
    run = on_gpus('echo "$CUDA_VISIBLE_DEVICES ${*: -3}"', "--processes=2")
    out, _ = run.communicate(timeout=20)
    assert sorted(out.splitlines()) == [
        f"{gpus} --coordinator=localhost:8476 --num_processes=2 --process_id={number}"
        for number, gpus in enumerate(("0,1", "2,3"))
    ]
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_reaches_all_processes(cloud, on_gpus, number, code):
    program = (
        f"trap 'exit {code}' {int(number)}; touch {cloud.folder}/ready$$;"
        " while :; do sleep 0.05; done"
    )
    run = on_gpus(program, "--processes=2")
    wait_for(lambda: len([*cloud.folder.glob("ready*")]) == 2)
    run.send_signal(number)
    assert run.wait(20) == code
    run.stdout.close()


def test_an_error_outweighs_a_stop(on_gpus):
    run = on_gpus("case $* in *id=0*) exit 75 ;; *) exit 2 ;; esac", "--processes=2")
    assert run.wait(20) == 2
    run.stdout.close()
