"""Certificates for TLS, made by openssl."""

import subprocess
from pathlib import Path


def certificates(directory: Path) -> Path:
    """Create a CA with a server and a client certificate, and a second CA that signed neither."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)

    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )
    (directory / "san").write_text("subjectAltName=DNS:localhost,DNS:triton.test")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            *("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey"),
            *(f"{authority}.key", "-CAcreateserial", "-extfile", "san", "-out", f"{name}.pem"),
        )
    return directory


def tls_flags(files: Path, *, mutual: bool) -> list[str]:
    """Return Triton's flags for these certificates."""
    return [
        f"--grpc-use-ssl{'-mutual' if mutual else ''}=true",
        f"--grpc-server-cert={files / 'server.pem'}",
        f"--grpc-server-key={files / 'server.key'}",
        f"--grpc-root-cert={files / 'ca.pem'}",
    ]
