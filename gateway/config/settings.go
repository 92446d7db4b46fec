// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/caarlos0/env/v11"

	"github.com/tlsnat/tlsnat/gateway/printable"
	"github.com/tlsnat/tlsnat/natmap"
)

// Prefix is what the name of every setting begins with in the environment.
const Prefix = "TLSNAT_"

// Settings is everything an operator sets outside the map. The doc tags are the manual: `tlsnat env` and the table
// in the README are made from them.
type Settings struct {
	Map        string `env:"MAP" doc:"The rules themselves, separated by newlines or ';'."`
	MapFile    string `env:"MAP_FILE" doc:"A file with rules, or a directory whose *.natmap files are read in name order."`
	Certs      string `env:"CERTS" doc:"Directory with certificates and keys in PEM. The names are read from the certificates."`
	BackendCAs string `env:"BACKEND_CAS" doc:"Directory with the CAs that backend-ca=NAME names: NAME.pem holds the certificates of one or more."`
	Watch      string `env:"WATCH" envDefault:"off" doc:"on: look at the files of map, certificates and CAs every second or two, and reload when they have changed. The container image sets it. Otherwise SIGHUP or 'tlsnat reload' reads them again."`
	State      string `env:"STATE" doc:"Directory for what tlsnat makes itself (the demo's certificate). Default: $STATE_DIRECTORY, else tlsnat in the user's cache directory."`

	Admin      string `env:"ADMIN" envDefault:"127.0.0.1:9180" doc:"Address of the admin page, health checks and metrics; 'off' for none. Off loopback it demands ADMIN_TOKEN."`
	AdminToken string `env:"ADMIN_TOKEN" doc:"Bearer token that the admin address demands (not for /healthz and /readyz). If it is not set, reading is open on loopback, and orders need the token in the file admin-token of the state directory, which is made at the start." secret:"yes"`
	// Of a secret there is always the name of a file, too.
	AdminTokenFile string `env:"ADMIN_TOKEN_FILE" doc:"File that holds ADMIN_TOKEN. systemd: LoadCredential=admin-token:PATH does the same without a setting."`
	AdminSocket    string `env:"ADMIN_SOCKET" doc:"Path of the Unix socket for orders and for the commands reload, show and backend; 'off' for none. Default: admin.sock in $RUNTIME_DIRECTORY, else in tlsnat of $XDG_RUNTIME_DIR, else in the state directory (admin-PORT.sock where ADMIN has another port than 9180); none with ADMIN=off."`
	LogLevel       string `env:"LOG_LEVEL" envDefault:"info" doc:"debug, info (a line for each connection), warn or error."`
	LogFormat      string `env:"LOG_FORMAT" envDefault:"json" doc:"json or console."`

	Loops      int            `env:"LOOPS" doc:"Number of event loops. Default: one per CPU of the process."`
	MaxConns   int            `env:"MAX_CONNS" doc:"Maximum number of open connections; further ones are closed with outcome 'limited'. Default: what the limit of open files and MEMORY allow."`
	Memory     Size           `env:"MEMORY" doc:"Maximum memory for data that clients and backends have not taken yet, for example 512MB. Each loop has an equal part. Each source (IPv4 address, IPv6 /64) may use as much of it as is free besides. When it is full, new connections are closed with outcome 'limited'. Default: half of the memory that the process may use (cgroup), or of the machine's."`
	Handshakes int            `env:"HANDSHAKES" envDefault:"4096" doc:"Maximum number of TLS handshakes in progress, at about 20 KiB each. If all places are taken, the address with the most loses the handshake that is silent for longest. The same number of ClientHellos may queue, and of handshakes with tls:// backends be in progress. Each loop has an equal part."`
	ProxyFrom  []netip.Prefix `env:"PROXY_FROM" doc:"Addresses and CIDRs, separated by commas, of load balancers. Their connections have to begin with a PROXY header (v1 or v2), which is trusted. From all others it is refused."`
	Resolver   string         `env:"RESOLVER" doc:"Address and port of the DNS server for backends' names. Default: the servers in /etc/resolv.conf."`
	MinTLS     string         `env:"MIN_TLS" envDefault:"1.2" doc:"The oldest TLS version spoken, with clients and with tls:// backends: 1.2 or 1.3."`
	KTLS       string         `env:"KTLS" envDefault:"auto" doc:"auto: the kernel sends TLS for connections that stream, and receives it from Linux 7.0 on; rx: it receives on older kernels too; off: neither."`

	HelloTimeout   time.Duration `env:"HELLO_TIMEOUT" envDefault:"10s" doc:"Time from accept to the whole ClientHello (with the PROXY header), and again to the end of the handshake. The second is shorter, down to 1.5s, while more than half of TLSNAT_HANDSHAKES are in progress."`
	ConnectTimeout time.Duration `env:"CONNECT_TIMEOUT" envDefault:"5s" doc:"Time to reach a backend, for all backends together, with the TLS handshake of a tls:// one."`
	IdleTimeout    time.Duration `env:"IDLE_TIMEOUT" envDefault:"15m" doc:"A connection that carries no byte for this time is ended."`
	LingerTimeout  time.Duration `env:"LINGER_TIMEOUT" envDefault:"1m" doc:"The same for a connection of which one side has ended its stream."`
	DrainTimeout   time.Duration `env:"DRAIN_TIMEOUT" envDefault:"30s" doc:"Time after SIGTERM (and SHUTDOWN_DELAY) until connections that are still open are cut."`
	ShutdownDelay  time.Duration `env:"SHUTDOWN_DELAY" envDefault:"0s" doc:"After SIGTERM: /readyz fails at once, and new connections are still accepted for this time, until load balancers have noticed. DRAIN_TIMEOUT begins after it."`
}

// SettingError is one complaint about one setting.
type SettingError struct {
	Key   string // with its prefix
	Value string // as given; empty for secrets
	Msg   string // what is wrong; what to write instead
}

func (e *SettingError) Error() string {
	if e.Value == "" {
		return e.Key + ": " + e.Msg
	}
	return fmt.Sprintf("%s=%s: %s", e.Key, printable.Quoted(e.Value), e.Msg)
}

// wrapped says what is wrong with a value that came with more around it than was meant; "" if nothing is. Docker's
// --env-file keeps quotes, and a file from Windows has a carriage return at the end of each line. In the rules a line may
// end as it likes.
func wrapped(key, value string) string {
	n := len(value)
	switch {
	case n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0]:
		return "is in quotes, which belong to the value here; write it without them (docker --env-file keeps quotes)"
	case key == Prefix+"MAP":
		return ""
	case strings.HasSuffix(value, "\r"):
		return "ends in a carriage return; save the file that it comes from with Unix line ends"
	case strings.HasPrefix(value, "\ufeff"):
		return "begins with a byte order mark; save the file that it comes from without it"
	case strings.ContainsFunc(value, unicode.IsControl):
		return "has a character that cannot be seen; write it without"
	}
	return ""
}

// hidden says whether a setting's value is not shown.
func hidden(key string) bool {
	for f := range fields() {
		if Prefix+f.Tag.Get("env") == key {
			return f.Tag.Get("secret") != ""
		}
	}
	return false
}

// SettingDoc describes one setting.
type SettingDoc struct{ Name, Type, Default, Doc string }

// SettingDocs lists every setting in the order of the struct.
func SettingDocs() []SettingDoc {
	var docs []SettingDoc
	for f := range fields() {
		docs = append(docs, SettingDoc{Prefix + f.Tag.Get("env"), typeWord(f.Type), f.Tag.Get("envDefault"), f.Tag.Get("doc")})
	}
	return docs
}

func fields() func(yield func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		t := reflect.TypeFor[Settings]()
		for i := range t.NumField() {
			if !yield(t.Field(i)) {
				return
			}
		}
	}
}

// typeWord is what an operator calls the type.
func typeWord(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[time.Duration]():
		return "duration"
	case reflect.TypeFor[[]netip.Prefix]():
		return "CIDRs"
	case reflect.TypeFor[int]():
		return "number"
	case reflect.TypeFor[Size]():
		return "size"
	}
	return "text"
}

// ReadSettings reads the settings from environ (KEY=VALUE, as os.Environ gives it). All complaints come at once,
// joined; each is a *SettingError.
func ReadSettings(environ []string) (Settings, error) {
	var s Settings
	vars, problems := ours(environ)
	problems = append(problems, readSecrets(vars, environ)...)
	err := env.ParseWithOptions(&s, env.Options{
		Prefix:      Prefix,
		Environment: vars,
		FuncMap: map[reflect.Type]env.ParserFunc{
			reflect.TypeFor[[]netip.Prefix](): parsePrefixes,
		},
	})
	problems = append(problems, parseComplaints(err, vars)...)
	for _, p := range s.check() {
		if !complained(problems, p) {
			problems = append(problems, p)
		}
	}
	s.fillIn()
	return s, errors.Join(problems...)
}

// complained says whether there is a complaint about the same setting: a value that was not understood is not judged
// as well.
func complained(problems []error, about error) bool {
	key := func(err error) string {
		e, _ := errors.AsType[*SettingError](err)
		if e == nil {
			return ""
		}
		return e.Key
	}
	return slices.ContainsFunc(problems, func(p error) bool { return key(p) != "" && key(p) == key(about) })
}

// ours picks the variables with our prefix and complains about those that no setting has: a typing slip must not
// pass silently. The other variables are kept, so that the defaults can look at STATE_DIRECTORY.
func ours(environ []string) (map[string]string, []error) {
	var known []string
	for f := range fields() {
		known = append(known, Prefix+f.Tag.Get("env"))
	}
	vars := map[string]string{}
	var problems []error
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(key, Prefix) {
			continue
		}
		if !slices.Contains(known, key) {
			if isServiceLink(key, value) {
				continue
			}
			problems = append(problems, &SettingError{Key: key, Msg: "there is no such setting; " + suggestion(key, known)})
			continue
		}
		if msg := wrapped(key, value); msg != "" {
			if hidden(key) {
				value = ""
			}
			problems = append(problems, &SettingError{key, value, msg})
			continue // what it would mean is not asked
		}
		if value != "" {
			vars[key] = value
		}
	}
	return vars, problems
}

// parseComplaints turns what the env package says into our words.
func parseComplaints(err error, vars map[string]string) []error {
	if err == nil {
		return nil
	}
	var all env.AggregateError
	if !errors.As(err, &all) {
		return []error{err}
	}
	var problems []error
	for _, e := range all.Errors {
		var pe env.ParseError
		if !errors.As(e, &pe) {
			problems = append(problems, e)
			continue
		}
		f, _ := reflect.TypeFor[Settings]().FieldByName(pe.Name)
		key := Prefix + f.Tag.Get("env")
		msg := expected(f.Type)
		if f.Type == reflect.TypeFor[[]netip.Prefix]() {
			msg = pe.Err.Error() // says which of them
		}
		problems = append(problems, &SettingError{key, vars[key], msg})
	}
	return problems
}

func expected(t reflect.Type) string {
	switch typeWord(t) {
	case "duration":
		return "not a duration; write a number with a unit, such as 500ms, 10s or 15m"
	case "CIDRs":
		return "not a list of addresses; write addresses or CIDRs separated by commas, such as 10.0.0.0/8,2001:db8::7"
	case "size":
		return "not a size; write a number with a unit, such as 512MB or 4GB"
	case "number":
		return "not a number; write digits only"
	}
	return "can't be read"
}

// ParsePrefix reads an address, which is meant alone, or a prefix, as the map does. Bits behind the prefix do not matter.
func ParsePrefix(s string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(s); err == nil && !p.Addr().Is4In6() {
		s = p.Masked().String()
	}
	p, msg, hint := natmap.ParsePrefix(s)
	if msg != "" {
		return p, errors.New(msg + "; " + hint)
	}
	return p, nil
}

func parsePrefixes(s string) (any, error) {
	var all []netip.Prefix
	for item := range strings.SplitSeq(s, ",") {
		p, err := ParsePrefix(strings.TrimSpace(item))
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// check looks at what each value means.
func (s *Settings) check() []error {
	var problems []error
	bad := func(key, value, msg string) {
		problems = append(problems, &SettingError{Prefix + key, value, msg})
	}
	oneOf := func(key, value string, words ...string) {
		if !slices.Contains(words, value) {
			bad(key, value, "write "+strings.Join(words[:len(words)-1], ", ")+" or "+words[len(words)-1])
		}
	}
	oneOf("LOG_LEVEL", s.LogLevel, "debug", "info", "warn", "error")
	oneOf("LOG_FORMAT", s.LogFormat, "json", "console")
	oneOf("KTLS", s.KTLS, "auto", "rx", "off")
	oneOf("MIN_TLS", s.MinTLS, "1.2", "1.3")
	oneOf("WATCH", s.Watch, "on", "off")
	longer := func(key string, d time.Duration) {
		if d <= 0 {
			bad(key, d.String(), "a timeout has to be longer than nothing; to make it not matter write a long one, such as 24h")
		}
	}
	longer("HELLO_TIMEOUT", s.HelloTimeout)
	longer("CONNECT_TIMEOUT", s.ConnectTimeout)
	longer("IDLE_TIMEOUT", s.IdleTimeout)
	longer("LINGER_TIMEOUT", s.LingerTimeout)
	if s.DrainTimeout < 0 {
		bad("DRAIN_TIMEOUT", s.DrainTimeout.String(), "can't be negative; 0s cuts at once")
	}
	if s.ShutdownDelay < 0 {
		bad("SHUTDOWN_DELAY", s.ShutdownDelay.String(), "can't be negative; 0s stops accepting at once")
	}
	if s.Loops < 0 || s.Loops > 1024 {
		bad("LOOPS", fmt.Sprint(s.Loops), "write a number from 1 to 1024, or leave it out for one loop per CPU")
	}
	if _, err := netip.ParseAddrPort(s.Resolver); err != nil && s.Resolver != "" {
		bad("RESOLVER", s.Resolver, "not an address with a port; write one such as 10.0.0.53:53, or leave it out for what /etc/resolv.conf says")
	}
	if s.MaxConns < 0 {
		bad("MAX_CONNS", fmt.Sprint(s.MaxConns), "can't be negative; leave it out for what the limit of open files allows")
	}
	if s.Memory != 0 && s.Memory < leastMemory {
		bad("MEMORY", s.Memory.String(), "write at least "+leastMemory.String()+", or leave it out for half of what there is")
	}
	if s.Handshakes < 1 {
		bad("HANDSHAKES", fmt.Sprint(s.Handshakes), "at least 1 handshake has to be possible at once")
	}
	return append(problems, s.checkAdmin()...)
}

// fillIn sets the defaults that depend on the machine.
func (s *Settings) fillIn() {
	if s.Loops == 0 {
		s.Loops = runtime.GOMAXPROCS(0)
	}
	if s.Memory == 0 {
		s.Memory = defaultMemory("/")
	}
	if s.State == "" {
		s.State = defaultState()
	}
}

// OldestTLS is the oldest version of TLS that is spoken, as crypto/tls numbers it.
func (s *Settings) OldestTLS() uint16 {
	if s.MinTLS == "1.3" {
		return tls.VersionTLS13
	}
	return tls.VersionTLS12
}

// Trusts says whether connections from the address begin with a PROXY header, which is believed.
func (s *Settings) Trusts(a netip.Addr) bool {
	return slices.ContainsFunc(s.ProxyFrom, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (s *Settings) checkAdmin() []error {
	if s.Admin == "off" {
		return nil
	}
	ap, err := netip.ParseAddrPort(s.Admin)
	if err != nil {
		return []error{&SettingError{Prefix + "ADMIN", s.Admin, "not an address with a port; write 127.0.0.1:9180, [::1]:9180, or off"}}
	}
	if !ap.Addr().IsLoopback() && s.AdminToken == "" {
		return []error{&SettingError{Prefix + "ADMIN", s.Admin, "is not a loopback address, and then " + Prefix + "ADMIN_TOKEN has to be set"}}
	}
	return nil
}

// defaultState is where systemd's StateDirectory= points, or a directory of the user's.
func defaultState() string {
	if d := os.Getenv("STATE_DIRECTORY"); d != "" {
		return d
	}
	if d, err := os.UserCacheDir(); err == nil {
		return filepath.Join(d, "tlsnat")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("tlsnat-%d", os.Getuid()))
}

// suggestion names the setting that is probably meant, or says where to find them all.
func suggestion(key string, known []string) string {
	names := make([]string, len(known))
	for i, k := range known {
		names[i] = strings.TrimPrefix(k, Prefix)
	}
	if name := natmap.Nearest(strings.TrimPrefix(key, Prefix), names); name != "" {
		return "did you mean " + Prefix + name + "?"
	}
	return "'tlsnat env' lists them all"
}
