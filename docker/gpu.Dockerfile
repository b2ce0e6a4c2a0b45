# The package for NVIDIA GPUs, installed from a checkout. Build it at the root of the checkout:
#   docker build --file docker/gpu.Dockerfile --tag mlip:gpu .
# The image holds CUDA; the host needs a driver and the NVIDIA container toolkit.
FROM python:3.12-slim

# The pods of launch/jobset_gpu.yaml may write to their volumes as group 1000. Runs without --workdir
# go to runs/ beside the configs.
RUN groupadd --gid 1000 mlip \
    && useradd --create-home --uid 1000 --gid mlip mlip \
    && install --directory --owner=mlip --group=mlip /mlip_jax
WORKDIR /mlip_jax
COPY --chown=mlip:mlip . .
RUN pip install --no-cache-dir --editable ".[gpu,kubernetes,gcs,s3]"

USER 1000:1000
ENTRYPOINT ["mlip"]
