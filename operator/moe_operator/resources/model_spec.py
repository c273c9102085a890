"""spec.model: which model is served, and where its checkpoint comes from."""

from __future__ import annotations

from typing import Final

from pydantic import ConfigDict, Field

from moe_operator.resources import quantity
from moe_operator.resources.base import Model, rules
from moe_operator.resources.pods import Amount

IMAGE: Final = (
    "[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    "(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,128})?"
)
"""Pattern of an image's name."""
MODEL_FOLDER: Final = "/mnt/moe-model"
"""Where a model that is not a directory of the node appears in the worker's container."""
CACHE_FOLDER: Final = "/mnt/moe-cache"
"""Where the cache of downloaded models appears."""
FETCHED: Final = ("hf", "s3", "gs")
"""Schemes of models that are downloaded."""

_SEGMENT = "[A-Za-z0-9._@+=,~-]+"
_OBJECT = "[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_FORMS: Final = {
    "file": (
        f"(/{_SEGMENT})+/?",
        "an absolute path (three slashes in all), e.g. file:///mnt/models/docs-moe",
    ),
    "hf": (
        "[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}(@[A-Za-z0-9._/-]{1,255})?",
        "the model's owner and name and an optional revision, e.g. hf://deepseek-ai/DeepSeek-V2-Lite@main",
    ),
    "s3": (
        f"[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/{_SEGMENT})*/?",
        "a bucket and a path, e.g. s3://models/deepseek-v2-lite",
    ),
    "gs": (
        f"[a-z0-9][a-z0-9._-]{{1,220}}[a-z0-9](/{_SEGMENT})*/?",
        "a bucket and a path, e.g. gs://models/deepseek-v2-lite",
    ),
    "pvc": (
        f"{_OBJECT}(/{_SEGMENT})*/?",
        "the name of a PersistentVolumeClaim and a path in it, e.g. pvc://models/deepseek-v2-lite",
    ),
    "oci": (IMAGE, "an image with the checkpoint's files at its root, e.g. oci://ghcr.io/example/model:1"),
}
_SCHEMES = ", ".join(f"{name}://" for name in _FORMS)
_URI_RULES = (
    (
        f"self.matches('^({'|'.join(_FORMS)})://')",
        f"a model's uri begins with one of {_SCHEMES}: write e.g. hf://OWNER/NAME or pvc://CLAIM/PATH",
    ),
    *(
        (
            f"!self.startsWith('{name}://') || self.matches('^{name}://{form}$')",
            f"after {name}:// comes {meaning}",
        )
        for name, (form, meaning) in _FORMS.items()
    ),
    ("!self.matches('/[.][.]?(/|$)')", "the path must not hold . or .. as a part: write it out"),
    (
        "!self.matches('^file:///tmp/?$')",
        "the container has a /tmp of its own: put the checkpoint elsewhere",
    ),
)
_IS_FETCHED = f"self.uri.matches('^({'|'.join(FETCHED)})://')"


class ModelCache(Model):
    """Where downloaded checkpoints are kept."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!(has(self.claimName) && has(self.hostPath))",
                "a cache is in one place: set claimName or hostPath, not both",
            )
        )
    )

    claim_name: str | None = Field(
        default=None,
        description="PersistentVolumeClaim that all replicas share (ReadWriteMany, or one node). Default: an "
        "emptyDir of each pod, so each replica downloads the model.",
        min_length=1,
        max_length=253,
        pattern=f"^{_OBJECT}$",
    )
    host_path: str | None = Field(
        default=None,
        description="Existing directory of each node that its replicas share, writable for workers, below "
        "a root that the administrator allows (modelRoots of the chart). Default: none.",
        max_length=1024,
        json_schema_extra=rules(
            (
                f"self.matches('^(/{_SEGMENT})+/?$') && !self.matches('/[.][.]?(/|$)')",
                "hostPath is an absolute path without . and .. as parts, e.g. /var/cache/moe",
            )
        ),
    )
    max_size: Amount | None = Field(
        default=None,
        description="Maximum bytes of the cache, e.g. 500Gi; the least recently used models are evicted. "
        "It is also the sizeLimit of an emptyDir. Default: what the disk holds.",
    )

    @property
    def most_bytes(self) -> int:
        """`max_size` in bytes; 0 without it."""
        return 0 if self.max_size is None else int(quantity.parse(self.max_size))


class ModelSource(Model):
    """The served model."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                f"{_IS_FETCHED} || !(has(self.credentialsSecret) || has(self.cache))",
                "credentialsSecret and cache are for models that are downloaded (hf://, s3://, gs://)",
            ),
            (
                "self.uri.matches('^(hf|s3)://') || !has(self.endpoint)",
                "endpoint is for models of a hub or an S3 API (hf://, s3://)",
            ),
        )
    )

    uri: str = Field(
        description="Location of the checkpoint (config.json, tokenizer.json, safetensors). file:// and the "
        "absolute path of a directory on every node, below a root that the administrator allows; "
        "hf://OWNER/NAME[@REVISION]; s3://BUCKET/PATH; gs://BUCKET/PATH; pvc://CLAIM/PATH; oci://IMAGE (the "
        "cluster has to support image volumes). Required.",
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(*_URI_RULES),
    )
    served_name: str | None = Field(
        default=None,
        description="Name of the model in requests. Default: metadata.name.",
        min_length=1,
        max_length=128,
        pattern="^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$",
    )
    credentials_secret: str | None = Field(
        default=None,
        description="Secret whose keys are variables for the download: HF_TOKEN; AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_REGION; GOOGLE_SERVICE_ACCOUNT_KEY. Default: none.",
        min_length=1,
        max_length=253,
        pattern=f"^{_OBJECT}$",
    )
    endpoint: str | None = Field(
        default=None,
        description="URL of a proxy of the hub, or of another S3 API, e.g. MinIO. Default: the public one.",
        max_length=1024,
        pattern="^https?://[A-Za-z0-9._:/-]+$",
    )
    cache: ModelCache | None = Field(
        default=None,
        description="Where downloaded checkpoints are kept. Default: in an emptyDir of each pod.",
    )

    @property
    def scheme(self) -> str:
        """ "file", "hf", "s3", "gs", "pvc" or "oci"."""
        return self.uri.partition("://")[0]

    @property
    def rest(self) -> str:
        """What comes after the scheme, without a slash at its end."""
        return self.uri.partition("://")[2].rstrip("/")

    @property
    def is_fetched(self) -> bool:
        """Whether it is downloaded before a worker starts."""
        return self.scheme in FETCHED

    @property
    def folder(self) -> str:
        """The checkpoint's directory in the worker's container."""
        if self.scheme == "file":
            return self.rest
        if self.scheme == "pvc":
            _, _, path = self.rest.partition("/")
            return f"{MODEL_FOLDER}/{path}" if path else MODEL_FOLDER
        return f"{MODEL_FOLDER}/current" if self.is_fetched else MODEL_FOLDER
