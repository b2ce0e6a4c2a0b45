# The package for TPUs, installed from a checkout. Build it at the root of the checkout:
#   docker build --file docker/tpu.Dockerfile --tag mlip:tpu .
FROM python:3.12-slim

# The pods of launch/jobset_tpu.yaml may write to their volumes as group 1000. Runs without --workdir
# go to runs/ beside the configs.
RUN groupadd --gid 1000 mlip \
    && useradd --create-home --uid 1000 --gid mlip mlip \
    && install --directory --owner=mlip --group=mlip /mlip_jax
WORKDIR /mlip_jax
COPY --chown=mlip:mlip . .
RUN pip install --no-cache-dir --editable ".[tpu,gcs]"

USER 1000:1000
ENTRYPOINT ["mlip"]
