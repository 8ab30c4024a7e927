"""The page shows the certificate that its files hold when somebody comes, and goes on with those who are there."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import pytest

from cryofleet.access.certificates import AUTHORITY, CERTIFICATE, KEY, make_set
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import TlsFiles
from services.viewer.service.tls import page_context


def files(folder: Path) -> TlsFiles:
    return TlsFiles(folder / CERTIFICATE, folder / KEY, folder / AUTHORITY)


class Visit:
    """A browser's connection to the page, in memory."""

    def __init__(self, context: ssl.SSLContext, name: str | None = "localhost") -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        self.browser = client.wrap_bio(incoming, outgoing, server_hostname=name)
        self.page = context.wrap_bio(outgoing, incoming, server_side=True)
        done: set[str] = set()
        while len(done) < 2:
            for side, end in (("browser", self.browser), ("page", self.page)):
                try:
                    end.do_handshake()
                    done.add(side)
                except ssl.SSLWantReadError:
                    pass

    @property
    def certificate(self) -> bytes:
        return self.browser.getpeercert(binary_form=True) or b""


def der(folder: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(
        (folder / CERTIFICATE).read_text().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"
    )


@pytest.mark.parametrize("name", ["localhost", None])
def test_a_renewed_certificate_is_shown_to_the_next(tmp_path: Path, name: str | None) -> None:
    old, new, shown = (tmp_path / folder for folder in ("old", "new", "shown"))
    for folder in (old, new):
        make_set(folder)
    shutil.copytree(old / "client", shown)
    context = page_context(files(shown))
    before = Visit(context, name)
    assert before.certificate == der(old / "client")
    # Half of it is there: the one that was read before is shown, until the other half has come.
    shutil.copy(new / "client" / KEY, shown / KEY)
    assert Visit(context, name).certificate == der(old / "client")
    shutil.copy(new / "client" / CERTIFICATE, shown / CERTIFICATE)
    assert Visit(context, name).certificate == der(new / "client")
    assert Visit(context, name).certificate == der(new / "client")
    # Who was there before goes on.
    before.page.write(b"a slice")
    assert before.browser.read() == b"a slice"


def test_no_certificate_is_said_at_the_start(tmp_path: Path) -> None:
    make_set(tmp_path)
    shutil.copy(tmp_path / "io" / KEY, tmp_path / "client" / KEY)
    with pytest.raises(FailedPrecondition, match=r"tls\.crt.*no certificate with its key"):
        page_context(files(tmp_path / "client"))
