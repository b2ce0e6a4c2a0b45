"""What --help prints."""

HELP = """\
Trains and evaluates language-image models.

  python -m mlip_jax.main [VERB] --config=FILE[:name=value,...] [--workdir=DIR] [--config.KEY=VALUE]
  python -m mlip_jax.main evaluate --workdir=DIR [--suite=NAME]
  python -m mlip_jax.main evaluate --compare=DIR,DIR
  python -m mlip_jax.main prepare --source=KIND:PATH --out=DIR
  python -m mlip_jax.main search --workdir=DIR --images=FOLDER --text=WORDS
  python -m mlip_jax.main export --workdir=DIR --out=DIR [--format=NAME]
  python -m mlip_jax.main plan --config=FILE --topology=NAME [--mesh=AXIS:SIZE,...]

Verbs
  train     train, evaluate, write a report; the same command resumes (default)
  evaluate  score the workdir's model again
  report    write the workdir's report again
  benchmark time the training step here, of several configs in turns, or beside open_clip
  prepare   write a set as shards that are fast to read: tars, tables, Parquet, class folders, ...
  export    write the workdir's model for others: weights or programs, and a model card
  search    index a folder of images; find them by words or by an image, here or in a browser
  plan      compile the training step for devices that need not be there: memory, traffic, time

Flags
  --config=FILE       an experiment's file, such as configs/mlip.py; what follows a colon goes to
                      it. evaluate and report read the workdir's own config when it is left out
  --config.KEY=VALUE  another value for one key, such as --config.batch_size=64
  --workdir=DIR       what the run keeps; runs/<config.name> when it is left out. evaluate, export
                      and search also take an exported model, and open_clip's or Hugging Face's
                      folders
  --suite=NAME        evaluate: mlip, clip_lite (the evaluations of those papers), all, or some of
                      retrieval, zero_shot, linear_probe, few_shot, svm, grounding, concepts, with
                      commas between; the sets that config.evaluation names, or the run's own
  --rates=R,R,...     evaluate: at these rates of token merging, with the speed of each
  --out=DIR           export: the folder to write
  --format=NAME       export: mlip (default), hf_clip, open_clip, stablehlo or onnx
  --compare=DIR,DIR   evaluate: the results of several workdirs side by side; DIR may be a pattern
  --source=KIND:PATH  prepare: webdataset, parquet, huggingface, csv, jsonl, coco, folder, ...
  --out=DIR           prepare: the set's folder; the same command goes on with it
  --columns=ROLE=NAME,..  prepare: the columns of image, caption, label, tags, split
  --split=NAME        prepare: what all of it is; else as the source or the files' names say
  --classes=FILE      prepare: a classes.json that names the classes
  --resize=PIXELS     prepare: the shorter side of images that are larger
  --shard-records=N   prepare: 5000 when it is left out
  --workers=N         prepare: processes; as many as there are cores
  --max-skipped-share=S  prepare: the share of broken records that is no error; 0.01
                      search: of unreadable images; 0.5
  --licence=NAME, --attribution=TEXT  prepare: for the set's card
  --check             prepare: only compare what is in --out with its checksums
  --images=FOLDER     search: what to index, or to bring up to date; a set's KIND:PATH too
  --index=DIR         search: the index; WORKDIR/search/NAME of the images when it is left out
  --text=WORDS, --image=FILE  search: what to find; --top=N of it (10)
  --serve[=PORT]      search: a page at http://127.0.0.1:8765, for this machine alone
  --topology=NAME     plan: a slice of TPU chips, such as v5e:16x16 (needs the extra tpu), or cpu:8
  --mesh=AXIS:SIZE,.. plan: such as data:64,fsdp:4; config.mesh when it is left out
  --largest-batch     plan: also find the largest global batch that fits
  --steps=N           benchmark: how many are timed (20); --warmup=N before them (3)
  --input=data        benchmark: batches of config.data in place of a random one
  --only=data         benchmark: the input, beside Pillow and beside what the step takes
  --compare=FILE      benchmark: another config, "FILE --config.KEY=VALUE"; may be repeated
  --against=open_clip benchmark: open_clip's model of the same sizes (needs the extra bench)
  --coordinator=HOST:PORT, --processes=N, --process-id=I  train, evaluate, report, search: one of
                      several processes of a run (docs/launch.md)
  --help              this page

Examples
  python -m mlip_jax.main --config=configs/mlip.py
  python -m mlip_jax.main --config=configs/mlip.py --workdir=runs/half --config.samples=100000
  python -m mlip_jax.main evaluate --workdir=runs/mlip --suite=all
  python -m mlip_jax.main evaluate --workdir=runs/mlip --suite=linear_probe,svm \\
    --config.evaluation.linear_probe=folder:flowers --config.evaluation.svm=voc:VOC2007
  python -m mlip_jax.main evaluate --workdir=CLIP_FOLDER --rates=0,0.25,0.5
  python -m mlip_jax.main export --workdir=runs/mlip --out=mlip_model
  python -m mlip_jax.main search --workdir=runs/mlip --images=photos --text="a red car" --serve
  python -m mlip_jax.main evaluate --compare='runs/mlip*,runs/clip*'
  python -m mlip_jax.main prepare --source=webdataset:cc3m/{00000..00331}.tar --out=data/cc3m
"""
