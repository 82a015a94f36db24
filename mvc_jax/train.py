"""The program: reads the command line, checks the config, then runs the stages."""

import contextlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import artifacts, joining, object_store, processes, stage
from mvc_jax.command import (
    about,
    agreement,
    command_line,
    compare,
    completion,
    doctor,
    pipeline,
    plan,
    price,
    push,
    repeat,
    results,
    run_config,
    run_folder,
    sweep,
    tracking,
)
from mvc_jax.command.redo import ending_redo, move_aside, stages_to_move
from mvc_jax.command.take_over import take_over, take_over_parts
from mvc_jax.configs import common
from mvc_jax.errors import UserError, no_room
from mvc_jax.training import console, preemption, runtime, trackers

with epy.lazy_imports():  # imported at first use: a mistyped flag need not wait for JAX
    from mvc_jax.training import sharding

STAGES = pipeline.STAGES
_MAX_DETAILS = 100
_NO_READER = 141  # as a shell counts SIGPIPE
_ALONE_SECONDS = 7 * 86400.0  # a lost process is noticed by other means


def main(argv: Sequence[str] | None = None, *, part: bool = False) -> int:
    """Runs the command line; returns the exit code.

    `part` says that it is one of several that this process runs (`repeat`).
    """
    if part:
        return _main(argv, part=True)
    try:
        try:
            return _main(argv, part=False)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if console.is_unread():
            return _NO_READER
        raise


def _main(argv: Sequence[str] | None, *, part: bool) -> int:
    """As `main`, which ends quietly where nobody reads what is printed."""
    console.be_quiet()
    with preemption.handled():
        workdir = None
        try:
            words = list(sys.argv if argv is None else argv)
            words, place = command_line.take_place(words)
            if words[1:2] == ["compare"]:
                compare.run(words)
                return 0
            if words[1:2] == ["completion"]:
                return completion.run(words)
            if words[1:2] == ["doctor"]:
                return doctor.run(words)
            if words[1:2] == ["repeat"]:
                agreement.join(place)
                code = repeat.run(words, lambda words: main(words, part=True))
                joining.leave(code)
                return code
            if words[1:2] == ["push"]:
                push.run(words)
                return 0
            if words[1:2] == ["sweep"]:
                agreement.require_sweep_alone(place)
                sweep.run(words, sweep.Program(planned, run))
                return 0
            if words[1:2] == ["report"]:
                command = command_line.parse_report(words)
            else:
                command_line.require_command(words, completion.SUBCOMMANDS)
                named = words[1:2] == ["train"]
                words = [words[0], *words[2 if named else 1 :]]
                command = command_line.parse(words, about=about.HELP)
            workdir = command.workdir
            sources = [] if command.source is None else [command.source]
            options = {"redo": command.redo, "sources": sources}
            if command.dry_run:
                if place is None or place.number == 0:
                    dry_run(command.config, workdir, **options)
                return 0
            agreement.join(place)
            run(command.config, workdir, **options, verify=command.verify)
        except UserError as error:
            return _fail(error)
        except preemption.Preempted as stop:
            where = f" in {stop.where}" if stop.where else ""
            return _end(
                preemption.EXIT_CODE,
                f"stopped by SIGTERM{where}; rerun the same command to resume",
                together=stop.shared,
            )
        except KeyboardInterrupt:
            return _end(130, "interrupted; rerun the same command to resume")
        except Exception as error:
            if full := workdir and no_room(error, workdir):
                return _fail(full)
            if not processes.hosts:
                raise
            joining.await_verdict(error)  # it may be what a lost process has caused
            traceback.print_exc()
            line = (str(error).splitlines() or [""])[0]
            joining.leave(1, f"{type(error).__name__}: {line}")
        if not part:
            joining.leave(0)
        return 0


def run(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    redo: Sequence[str] = (),
    sources: Sequence[epath.Path] = (),
    verify: bool = False,
    announce: Callable[[Sequence[plan.Step]], None] | None = None,
) -> None:
    """Checks everything that needs no device, then runs the selected stages.

    Args:
      config: of the run.
      workdir: of the run.
      redo: stages to move aside and make again, or `all`.
      sources: other workdirs, from which finished stages that agree are taken over, and
        parts of others (`take_over.take_over_parts`).
      verify: whether to hash every file in the workdir first; otherwise one whose size
        and modification time did not change is taken for unchanged.
      announce: for one of many runs: called with the plan before any work, in place of
        printing what it takes and its results.
    """
    common.FIELDS.check(config)
    stages = pipeline.select(config)
    began = time.monotonic()
    agreement.require(config, workdir, redo=redo, sources=sources)
    if "caption" in stages and (redo or not stage.is_complete(workdir, "caption")):
        pipeline.module("caption").require_outside(config, workdir)
    processes.on_all(
        "the workdir", lambda: run_folder.check(workdir, config.min_free_disk_gib)
    )
    run_folder.require_shared(workdir)
    runtime.set_up(config.compilation_cache)
    with contextlib.ExitStack() as locks:
        locks.enter_context(run_folder.locked(workdir))
        for source in sources:
            locks.enter_context(run_folder.locked(source, "from"))
        if (config.mesh.data, config.mesh.fsdp) != (-1, 1):
            runtime.count_devices()

        def settings() -> tuple[list[str], ConfigDict]:
            moved = stages_to_move(redo, stages, config, workdir, sources)
            options = {"redo": moved, "sources": sources}
            return moved, run_config.as_begun(config, workdir, **options)

        moved, config = processes.on_all("the settings", settings)
        if verify:
            unmoved = [name for name in STAGES if name not in moved]
            processes.on_first(
                "the check of all files", lambda: verify_files(unmoved, config, workdir)
            )

        def planned() -> tuple[list[plan.Step], list[price.Price]]:
            steps = _plan(config, workdir, moved, sources)
            plan.require_possible(steps)
            prices = price.make(steps, config, workdir)
            price.require_room(prices, workdir)
            return steps, prices

        steps, prices = processes.on_all("the plan", planned)
        if announce:
            announce(steps)
        elif any(each.work for each in prices):
            logging.info(price.line(prices, workdir))

        def prepare() -> None:
            _prepare(steps, config, workdir)
            if moved:
                move_aside(redo, moved, stages, workdir)
            take_over({s.name: s.source for s in steps if s.source}, workdir)

        processes.on_first("the preparation", prepare)
        donors = {name: () if name in moved else sources for name in stages}
        with contextlib.ExitStack() as ending:
            if processes.is_first():
                ending.enter_context(ending_redo(workdir))
                ending.enter_context(tracking.opened(config, workdir, steps))
            worked = _run_stages(stages, config, workdir, prices, donors)
    if announce or not processes.is_first():
        return
    if config.generate.limit and "generate" in stages:
        print(f"contact sheet: {workdir / 'generate' / 'contact_sheet.png'}")
        return
    if worked:
        logging.info("%s in %.0f s", ", ".join(worked), time.monotonic() - began)
    else:
        logging.info("nothing to do: all %d stages are complete", len(stages))
    results.show(stages, config, workdir)


def dry_run(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    redo: Sequence[str] = (),
    sources: Sequence[epath.Path] = (),
) -> None:
    """Prints what `run` would do and what that takes; changes nothing.

    Raises:
      UserError: as `run` would, before it starts.
    """
    config, steps = planned(config, workdir, redo=redo, sources=sources)
    prices = price.make(steps, config, workdir)
    print(price.table(prices, workdir))
    plan.require_possible(steps)
    price.require_room(prices, workdir)


def planned(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    redo: Sequence[str] = (),
    sources: Sequence[epath.Path] = (),
) -> tuple[ConfigDict, list[plan.Step]]:
    """The config as `run` would use it, and the plan; changes nothing.

    Raises:
      UserError: a field is wrong. A stage that is refused is in the plan.
    """
    common.FIELDS.check(config)
    moved = stages_to_move(redo, pipeline.select(config), config, workdir, sources)
    config = run_config.as_begun(config, workdir, redo=moved, sources=sources)
    return config, _plan(config, workdir, moved, sources)


def _plan(
    config: ConfigDict,
    workdir: epath.Path,
    moved: Sequence[str],
    sources: Sequence[epath.Path],
) -> list[plan.Step]:
    """The plan, whose stages with work are checked; changes nothing."""
    stages = pipeline.select(config)
    with object_store.listed(workdir):
        steps = plan.make(stages, config, workdir, redo=moved, sources=sources)
    try:
        todo = [step.name for step in steps if step.state != "done"]
        check_stages(todo, config)
        if "classify" in todo and "caption" not in todo:
            pipeline.module("classify").check_images(config, workdir)
    except UserError as error:  # both reasons, so that both can be corrected
        refused = [step for step in steps if step.error]
        error.details += tuple(f"also, {s.name}: {s.reason}" for s in refused)
        raise
    return steps


def _prepare(
    steps: Sequence[plan.Step], config: ConfigDict, workdir: epath.Path
) -> None:
    """The first changes of the workdir in a run that nothing refuses."""
    artifacts.collect_records(workdir)
    run_folder.remove_temporaries(workdir)
    preview = {"generate"} if config.generate.limit else set()
    works = [s.name for s in steps if s.state != "done" or s.source]
    if {*works} - preview or run_config.read(workdir) is None:
        run_config.write(config, workdir)


def _run_stages(
    stages: Sequence[str],
    config: ConfigDict,
    workdir: epath.Path,
    prices: Sequence[price.Price],
    donors: Mapping[str, Sequence[epath.Path]],
) -> list[str]:
    """Runs stages up to the preview, if there is one; returns those that had work."""
    worked, priced = [], {each.step.name: each for each in prices}
    for name in stages:
        if name == "generate" and config.generate.limit:
            _start_together()
            _run_alone_or_together(name, config, workdir)
            break
        taken = processes.on_first(
            f"parts of {name}",
            lambda name=name: take_over_parts(name, config, workdir, donors[name]),
        )
        if run_stage(name, config, workdir, priced[name], taken=taken):
            worked.append(name)
    return worked


def verify_files(names: Sequence[str], config: ConfigDict, workdir: epath.Path) -> None:
    """Hashes every file of these stages; deletes damaged ones that are made again.

    Raises:
      UserError: others are missing or were changed; `details` lists them.
    """
    damaged: dict[str, list[epath.Path]] = {}
    for name in names:
        if (workdir / name).exists():
            spec = pipeline.module(name).stage_spec(config)
            count, lost = stage.verify(workdir, spec)
            logging.info("%s: %d files compared", name, count)
            damaged |= {name: lost} if lost else {}
    if damaged:
        found = [str(path) for paths in damaged.values() for path in paths]
        raise UserError(
            f"--workdir={workdir}",
            wanted="the files that its stages wrote",
            got=f"{len(found)} that are missing or were changed since",
            fix=f"Restore them, or {stage.way_out(*damaged)}.",
            details=found,
        )


def check_stages(names: Sequence[str], config: ConfigDict) -> None:
    """Checks stages that have something to do; starts no JAX backend.

    Raises:
      UserError: a field is wrong.
    """
    trackers.check(config.track if names else ())
    for name in names:
        pipeline.module(name).check(config)
    if any(name in pipeline.MESH_STAGES for name in names):
        check_mesh(config.mesh.data, config.mesh.fsdp)


def check_mesh(data: int, fsdp: int) -> None:
    """Checks that the mesh fits the devices, unless it is the one that always fits."""
    if (data, fsdp) != (-1, 1):
        sharding.mesh_shape(data, fsdp, runtime.device_count())


def run_stage(
    name: str,
    config: ConfigDict,
    workdir: epath.Path,
    priced: price.Price,
    *,
    taken: Sequence[str] = (),
) -> bool:
    """Runs one stage and records its time; returns whether there was any work.

    `taken` are the parts that were taken over, whose time is not in it.
    """
    path = workdir / name / "manifest.json"
    before = path.stat().mtime if path.exists() else None
    began, compiled = time.monotonic(), runtime.compile_seconds()
    if priced.step.state != "done" and name in (*pipeline.MESH_STAGES, "evaluate"):
        _start_together()
    try:
        _run_alone_or_together(name, config, workdir)
    except preemption.Preempted as stop:
        stop.where = stop.where or name
        raise
    if not processes.is_first() or path.stat().mtime == before:
        return False
    seconds = time.monotonic() - began
    timing = {
        "seconds": round(seconds, 2),
        "compile_seconds": round(runtime.compile_seconds() - compiled, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    used = runtime.own_devices() if name in pipeline.MESH_STAGES else None
    if used is not None:
        timing["devices"] = {"kind": used.kind, "count": used.count}
    if taken:
        timing["taken_over"] = [*taken]
    run_folder.record_timing(workdir, name, timing)
    if not taken:
        price.record(priced, config.compilation_cache, timing)
    logging.info("%s: done in %.1f s", name, seconds)
    return True


def _run_alone_or_together(name: str, config: ConfigDict, workdir: epath.Path) -> None:
    """Runs a stage: in all processes, or in the first while the others wait."""
    run = pipeline.module(name).run
    if name in pipeline.ALONE:
        processes.on_first(
            f"stage {name}", lambda: run(config, workdir), _ALONE_SECONDS
        )
    else:
        run(config, workdir)


def _start_together() -> None:
    """Starts the backends of several processes, each of which waits for the others.

    The first one might else start its own while the others wait for its files.
    """
    if processes.count() > 1:
        runtime.start()


def _fail(error: UserError) -> int:
    lines = [f"error: {' '.join(str(error).split())}"]
    lines += [f"  {' '.join(line.split())}" for line in error.details[:_MAX_DETAILS]]
    if len(error.details) > _MAX_DETAILS:
        lines.append(f"  ... and {len(error.details) - _MAX_DETAILS} more")
    return _end(2, *lines, together=error.shared)


def _end(code: int, *lines: str, together: bool = False) -> int:
    """Prints why the run ends, once for all processes that end `together`.

    Of several processes, this one does not come back.
    """
    if processes.is_first() or not together:
        print(*(f"{processes.prefix()}{x}" for x in lines), sep="\n", file=sys.stderr)
    joining.leave(code, lines[0].removeprefix("error: "), together=together)
    return code


if __name__ == "__main__":
    sys.exit(main())
