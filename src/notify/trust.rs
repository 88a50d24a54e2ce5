//! Whom a receiver's certificate must come from: one store for webhooks, pings and mail.

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use std::error::Error;
use std::io;
use std::sync::Arc;

/// The given authorities (PEM), or those of the system.
pub(super) fn authorities(pem: Option<&[u8]>) -> Result<Vec<CertificateDer<'static>>, String> {
    let Some(pem) = pem else {
        let mut found = rustls_native_certs::load_native_certs().certs;
        // Among the system's are always some that rustls does not take.
        found.retain(|certificate| RootCertStore::empty().add(certificate.clone()).is_ok());
        return match found.is_empty() {
            true => Err(
                "this system has no certificate authorities: install ca-certificates, or say \
                 ca_file = \"…\""
                    .to_string(),
            ),
            false => Ok(found),
        };
    };
    let mut given = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("ca_file: not PEM: {error}"))?;
        RootCertStore::empty()
            .add(certificate.clone())
            .map_err(|error| format!("ca_file: not a certificate: {error}"))?;
        given.push(certificate);
    }
    match given.is_empty() {
        true => Err("ca_file: no certificate in PEM is in it".to_string()),
        false => Ok(given),
    }
}

/// TLS on ring, as everywhere in this program, with these authorities.
pub(super) fn client_config(
    authorities: Vec<CertificateDer<'static>>,
) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// A certificate that is not believed, somewhere below an error: no second attempt makes it better.
pub(super) fn distrust(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(|error| error.get_ref());
        let found = match inner {
            Some(inner) => inner.downcast_ref::<rustls::Error>(),
            None => error.downcast_ref::<rustls::Error>(),
        };
        if let Some(rustls::Error::InvalidCertificate(why)) = found {
            return Some(format!(
                "its certificate is not believed ({why}); for an authority of one's own: ca_file"
            ));
        }
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// What it all came from. The layers above say that there was an error; some of them say the address.
pub(super) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(below) = deepest.source() {
        deepest = below;
    }
    deepest.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_no_authority() {
        for (bad, said) in [
            (&b""[..], "no certificate"),
            (b"-----BEGIN CERTIFICATE-----\n", "PEM"),
            (
                b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "not a certificate",
            ),
        ] {
            let told = authorities(Some(bad)).unwrap_err();
            assert!(told.contains(said), "{told}");
        }
    }

    #[test]
    fn distrust_is_found_at_any_depth() {
        let why = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let deep = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, why));
        assert!(distrust(&deep).is_some_and(|told| told.contains("ca_file")));
        assert_eq!(distrust(&io::Error::other("refused")), None);
    }
}
