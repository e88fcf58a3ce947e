# SPDX-License-Identifier: MIT
"""What an object store answers when it refuses, in words that say what to do."""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

from ...errors import DirtyTrackError, InvalidCheckpoint, PermissionDenied, StoreFailed

__all__ = ["brief", "refusal", "says_bucket_missing", "was_cut"]


class _Known(NamedTuple):
    """A kind of refusal."""

    signs: re.Pattern[str]
    """In what the library says of it, which carries the server's answer."""
    kind: type[PermissionDenied | StoreFailed | InvalidCheckpoint]
    errno: int
    says: str


def _known(
    signs: str, kind: type[PermissionDenied | StoreFailed | InvalidCheckpoint], number: int, says: str
) -> _Known:
    return _Known(re.compile(signs), kind, number, says)


_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist|bucket does not exist")
# In this order: the first that fits.
_KNOWN = (
    _known(
        r"RequestTimeTooSkewed|RequestTimeTooSkew|Request has expired|difference between the request time",
        StoreFailed,
        errno.ETIME,
        "this machine's clock and the store's differ by more than it allows: set the clock (NTP)",
    ),
    _known(
        r"redirect without LOCATION|AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint"
        r"|the region '[^']*' is wrong",
        StoreFailed,
        errno.EXDEV,
        "the bucket is in another region: set AWS_REGION, or pass region=",
    ),
    _known(
        r"ExpiredToken|token included in the request is expired|TokenRefreshRequired",
        PermissionDenied,
        errno.EACCES,
        "the credentials have expired: renew them",
    ),
    _known(
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|InvalidSecurity|AuthenticationFailed|AuthorizationFailure"
        r"|UnauthenticatedError|Unauthenticated \{",
        PermissionDenied,
        errno.EACCES,
        "the credentials are wrong: look at those that the environment gives, or pass others",
    ),
    _known(
        r"169\.254\.169\.254|/latest/api/token|metadata\.google\.internal|MissingCredential|MissingSecretAccessKey"
        r"|MissingAccessKeyId|NoSuchCredentials|token/instance",
        PermissionDenied,
        errno.EACCES,
        "there are no credentials: set them in the environment as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or as "
        "the store's kind has them, or pass them",
    ),
    _known(
        r"PermissionDenied|AccessDenied|AllAccessDisabled|status: 403|403 Forbidden",
        PermissionDenied,
        errno.EACCES,
        "the credentials do not allow it",
    ),
    _known(
        r"BadScheme|URL scheme is not allowed|HTTP URL are not supported|allow_http",
        InvalidCheckpoint,
        errno.EINVAL,
        "the endpoint is plain HTTP: set AWS_ALLOW_HTTP=true, or pass client_options={'allow_http': True}",
    ),
    _known(
        r"NotImplemented|status: 501|NotSupported",
        StoreFailed,
        errno.ENOTSUP,
        "the store, or the library for its kind, cannot do that",
    ),
    _known(
        r"TimedOut|timed out|deadline has elapsed",
        StoreFailed,
        errno.ETIMEDOUT,
        "it did not answer in time: look at the network, or pass a longer client_options={'timeout': …}",
    ),
    _known(
        r"ConnectionRefused|Connection refused|dns error|Connect,|kind: Connect|tcp connect error|failed to lookup",
        StoreFailed,
        errno.ECONNREFUSED,
        "it cannot be reached: look at the endpoint and at the network",
    ),
)
_CUT = re.compile(r"kind: Interrupted|kind: Body|kind: Decode|IncompleteBody|IncompleteMessage|UnexpectedEof")
_ANSWER = re.compile(r"<Code>(.{1,80}?)</Code>(?:.{0,80}?<Message>(.{1,300}?)</Message>)?", re.DOTALL)


def says_bucket_missing(error: BaseException) -> bool:
    """Whether not the object but its bucket is missing."""
    return _BUCKET.search(str(error)) is not None


def was_cut(error: BaseException) -> bool:
    """Whether an answer was cut, and the library did not ask again."""
    text = str(error)
    return _CUT.search(text) is not None and re.search(r"\bretries: [1-9]", text) is None


def refusal(error: BaseException, doing: str) -> PermissionDenied | StoreFailed | InvalidCheckpoint:
    """The named error for a request that failed.

    Args:
        error: of the library.
        doing: what was being done, to which object, as in "read s3://b/p/manifests/…".
    """
    if isinstance(error, DirtyTrackError) and isinstance(error, (PermissionDenied, StoreFailed, InvalidCheckpoint)):
        return error
    text = f"{type(error).__name__}: {error}"
    answer = _ANSWER.search(text.replace("\\n", " ").replace('\\"', '"'))
    told = "" if answer is None else f" (it says {brief(': '.join(filter(None, answer.groups())))})"
    if says_bucket_missing(error):
        return InvalidCheckpoint(
            f"cannot {doing}: there is no such bucket. Make it first, or look at the name{told}", errno=errno.ENOENT
        )
    for known in _KNOWN:
        if known.signs.search(text):
            return known.kind(f"cannot {doing}: {known.says}{told}", errno=known.errno)
    return StoreFailed(f"cannot {doing}: {told.strip(' ()') or brief(text)}", errno=errno.EREMOTEIO)


def brief(text: str) -> str:
    """What the library says, on one line and not too long."""
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= 400 else f"{line[:400]}…"
