# Trains a small ReLU-attention language model and compares dense with sparse attention:
#
#     docker build --tag hsrjax .
#     docker run --rm hsrjax
#
# A command of your own goes behind the name: docker run --rm -it hsrjax python
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1
WORKDIR /hsrjax

# What hsrjax needs, before its source: a change of the source keeps this layer.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir hsrjax \
    && touch hsrjax/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt --editable ".[train]"

COPY hsrjax hsrjax
COPY models models
COPY train train

RUN useradd --create-home --uid 1000 hsrjax && mkdir runs && chown 1000 runs
USER 1000

CMD ["python", "-m", "train.demo", "--out", "runs/demo"]
