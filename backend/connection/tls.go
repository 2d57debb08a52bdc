package connection

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
)

// TLS is how connections of every type trust their servers, and show them who
// they are. Its zero value trusts what the system trusts.
type TLS struct {
	CA         string `json:"ca,omitempty"` // PEM
	Cert       string `json:"cert,omitempty"`
	Key        string `json:"key,omitempty"` // never read back
	ServerName string `json:"server_name,omitempty"`
	SkipVerify bool   `json:"skip_verify,omitempty"`
}

// SameTrust reports whether t and o let credentials go to the same servers.
func (t TLS) SameTrust(o TLS) bool {
	return t.CA == o.CA && t.ServerName == o.ServerName && t.SkipVerify == o.SkipVerify
}

// Config returns what a TLS client of a server at host uses. It is made anew at
// each call. Its errors name the field and hold nothing of what was given.
func (t TLS) Config(host string) (*tls.Config, error) {
	c := &tls.Config{
		ServerName: host, MinVersion: tls.VersionTLS12,
		InsecureSkipVerify: t.SkipVerify, //nolint:gosec // asked for by tls_skip_verify
	}
	if t.ServerName != "" {
		c.ServerName = t.ServerName
	}
	if t.CA != "" {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM([]byte(t.CA)) {
			return nil, errors.New("tls_ca holds no certificate: give one or more in PEM form")
		}
	}
	if (t.Cert == "") != (t.Key == "") {
		return nil, errors.New("tls_cert and tls_key belong together: give both, or neither")
	}
	if t.Cert != "" {
		pair, err := tls.X509KeyPair([]byte(t.Cert), []byte(t.Key))
		if err != nil {
			return nil, errors.New("tls_cert and tls_key are no certificate with its key: give both in PEM form, the key without a passphrase")
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// Distrust says in a sentence why a TLS handshake failed, where it was for lack
// of trust on either side; "" for every other error.
func Distrust(err error) string {
	var (
		untrusted *tls.CertificateVerificationError
		remote    *net.OpError
		record    tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &untrusted):
		return fmt.Sprintf("its certificate is not trusted (%v): check tls_ca and tls_server_name", untrusted.Err)
	case errors.As(err, &remote) && remote.Op == "remote error": // the only sign of an alert
		return fmt.Sprintf("it ended the TLS handshake (%v): check tls_cert and tls_key", remote.Err)
	case errors.As(err, &record):
		return "it does not speak TLS: check the port and the scheme of the address"
	}
	return ""
}
