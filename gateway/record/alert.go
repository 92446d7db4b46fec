// SPDX-License-Identifier: Apache-2.0

package record

import "fmt"

// Alert is an AlertDescription (RFC 8446 6, RFC 5246 7.2).
type Alert uint8

// The alerts that are sent or treated apart. Any other value may arrive.
const (
	AlertCloseNotify       Alert = 0
	AlertUnexpectedMessage Alert = 10
	AlertBadRecordMAC      Alert = 20
	AlertRecordOverflow    Alert = 22
	AlertHandshakeFailure  Alert = 40
	AlertIllegalParameter  Alert = 47
	AlertAccessDenied      Alert = 49
	AlertDecodeError       Alert = 50
	AlertProtocolVersion   Alert = 70
	AlertInternalError     Alert = 80
	AlertUserCanceled      Alert = 90
	AlertNoRenegotiation   Alert = 100
	AlertUnrecognizedName  Alert = 112
)

// AlertLevel (RFC 5246 7.2). TLS 1.3 sends it and does not read it (RFC 8446 6).
const (
	levelWarning = 1
	levelFatal   = 2
)

var alertNames = map[Alert]string{
	0: "close_notify", 10: "unexpected_message", 20: "bad_record_mac", 21: "decryption_failed",
	22: "record_overflow", 30: "decompression_failure", 40: "handshake_failure", 41: "no_certificate",
	42: "bad_certificate", 43: "unsupported_certificate", 44: "certificate_revoked",
	45: "certificate_expired", 46: "certificate_unknown", 47: "illegal_parameter", 48: "unknown_ca",
	49: "access_denied", 50: "decode_error", 51: "decrypt_error", 60: "export_restriction",
	70: "protocol_version", 71: "insufficient_security", 80: "internal_error",
	86: "inappropriate_fallback", 90: "user_canceled", 100: "no_renegotiation",
	109: "missing_extension", 110: "unsupported_extension", 111: "certificate_unobtainable",
	112: "unrecognized_name", 113: "bad_certificate_status_response", 114: "bad_certificate_hash_value",
	115: "unknown_psk_identity", 116: "certificate_required", 120: "no_application_protocol",
	121: "ech_required",
}

// String is the name in the IANA registry, such as "bad_record_mac".
func (a Alert) String() string {
	if name, ok := alertNames[a]; ok {
		return name
	}
	return fmt.Sprintf("alert(%d)", uint8(a))
}

// level is what the alert is sent with. These two are warnings (RFC 8446 6.1). no_renegotiation would be one (RFC 5246
// 7.2.2) if the connection went on; here it ends.
func (a Alert) level() byte {
	switch a {
	case AlertCloseNotify, AlertUserCanceled:
		return levelWarning
	}
	return levelFatal
}

// Body is the alert as a record carries it: level and description (RFC 8446 6).
func (a Alert) Body() [2]byte { return [2]byte{a.level(), byte(a)} }

// Error says why a Reader refuses what the peer sent. It is fatal: send Alert, then close.
type Error struct {
	Alert  Alert  // what to tell the peer
	Seq    uint64 // the record's sequence number under its keys
	Reason string // what was wrong, for the log
}

func (e *Error) Error() string {
	return fmt.Sprintf("tls record %d: %s (%s)", e.Seq, e.Reason, e.Alert)
}

// ErrClosed is what a Reader returns after close_notify, after the peer's fatal alert, after an error
// and after Wipe. No alert is owed for it: what follows a closure alert is ignored (RFC 8446 6.1).
var ErrClosed error = &Error{Alert: AlertCloseNotify, Reason: "reading is over, nothing more is opened"}
