// SPDX-License-Identifier: Apache-2.0

package gateway

// Outcome says in one word how a connection ended. The list is closed: it is a field of the log line, a label of
// the metrics and what tests assert.
type Outcome uint8

// The outcomes. Exactly one of them is counted and logged for every connection that was accepted.
const (
	OK                Outcome = iota // both sides ended their stream and everything was delivered
	ClientReset                      // the client sent RST, or vanished
	BackendReset                     // the backend sent RST, or vanished
	Idle                             // nothing moved for the idle timeout
	Lifetime                         // the rule's lifetime= was reached
	Drained                          // cut at the deadline of a drain, or by SIGQUIT
	BadProxy                         // the PROXY header was missing, malformed, or not to be believed
	BadHello                         // the first bytes are no ClientHello
	HelloTimeout                     // the PROXY header or the ClientHello did not arrive in time
	UnknownName                      // no rule, or no certificate, for the name in the ClientHello
	Denied                           // a rule says reject
	Limited                          // a limit was reached: connections, handshakes waiting
	HandshakeFailed                  // TLS could not be agreed on, or was given up by the client
	ClientCertRefused                // the client's certificate is missing or not accepted
	NoBackend                        // no backend to try: none configured is usable
	ConnectFailed                    // every backend was tried in vain
	TLSError                         // the client or the backend broke the record protocol after the handshake
	RekeyFailed                      // its keys had to change, and the kernel that carried it could not
	Internal                         // tlsnat's own fault
	outcomes
)

var outcomeNames = [outcomes]string{
	"ok", "client_reset", "backend_reset", "idle", "lifetime", "drained", "bad_proxy", "bad_hello", "hello_timeout",
	"unknown_name", "denied", "limited", "handshake_failed", "client_cert_refused", "no_backend", "connect_failed",
	"tls_error", "rekey_failed", "internal",
}

func (o Outcome) String() string { return outcomeNames[o] }
