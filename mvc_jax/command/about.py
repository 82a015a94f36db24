"""The help of the program, before its sections of fields."""

HELP = """Enlarges a small labelled image dataset by Mixing Visual Concepts.

Commands, each with --help:
    mvc-jax [train]      a run, whose stages go on where they stopped; it is
                         `python -m mvc_jax.train`, and what is described below
    mvc-jax repeat       the same with several seeds, and intervals over their splits
    mvc-jax sweep        a run for each value of a field, compared
    mvc-jax compare      finished runs side by side
    mvc-jax report       the report of a run, made again
    mvc-jax push         a finished run on the Hugging Face hub
    mvc-jax doctor       what this machine has, and what is missing for which stage
    mvc-jax completion   a line with which a shell completes all this

The digits, from scratch to a report (configs/*.py has other datasets):
    mvc-jax --config=configs/digits.py --workdir=runs/digits
A summary of your own images, in a folder (docs/your-own-images.md has the rest):
    mvc-jax --config=configs/folder.py:path=/data/parts --workdir=runs/parts \\
      --config.stages=caption
A preview of 16 synthetic images, and some stages only:
    mvc-jax --workdir=runs/digits --config.generate.limit=16
    mvc-jax --workdir=runs/digits --config.stages=generate,classify
What it would do, and the images, steps, disk, memory and hours that this takes:
    mvc-jax --workdir=runs/digits --dry_run
Other settings: what is not affected is taken over, or what is affected made again:
    mvc-jax --from=runs/digits --workdir=runs/fine --config.mix.modes=fine
    mvc-jax --workdir=runs/digits --config.classify.steps=500 --redo=classify
A run that was stopped is resumed by the same command.
The same with several seeds, which draw other splits, and an interval over them:
    mvc-jax repeat --seeds=0,1,2 --config=configs/digits.py --workdir=runs/splits
A run for each value of a field, and finished runs side by side:
    mvc-jax sweep --vary mix.tokens=1,2,4,7 --from=runs/digits --workdir=runs/tokens
    mvc-jax compare runs/digits runs/fine
What a finished run would publish on the Hugging Face hub:
    mvc-jax push --to=digits-mvc --workdir=runs/digits --license=mit --dry_run

Flags:
  --config=FILE[:ARGUMENT]         a Python file, whose get_config() takes ARGUMENT, or
                                   the config.json of a workdir; without it, that of
                                   --workdir, and for a new one configs/digits.py
  --config.SECTION.FIELD=VALUE     sets one field
  --workdir=FOLDER                 of this run's files
  --dry_run                        prints what would be done, and changes nothing
  --verify                         hashes every file of the workdir first; else a large
                                   one counts as unchanged by its size and time
  --redo=STAGE[,STAGE]             makes these stages, or `all`, and what depends on
                                   them again; the old ones move to FOLDER/earlier
  --from=WORKDIR                   starts from the config of another workdir, and takes
                                   over its stages where all settings agree, and
                                   parts of others that they leave as they are
  --coordinator=HOST:PORT          of several processes, one on each host or for each
  --num_processes=N                group of devices: the address of process 0, how many
  --process_id=I                   they are, and which this is. The same command in each
                                   of them on one shared workdir; not needed on TPU pods
                                   and in jobs of SLURM, Kubernetes and MPI
  --help, --help=SECTION           prints this, or every field of a section
  --version                        prints the version

Exit codes:
  0    success
  2    an error, whose message says how to fix it
  75   stopped by SIGTERM, or another process was lost: launchers retry on it, and the
       same command resumes
  130  stopped by Ctrl-C
  141  what reads the output, e.g. `head`, has ended
"""
