// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/tlsnat/tlsnat/gateway/certs"
)

// maxSecret is more than any token has; a file that is longer is another file.
const maxSecret = 4 << 10

// readSecrets fills in the secrets that vars does not have itself: from the file that NAME_FILE names, else from the
// credential of systemd that is called like the setting (admin-token), if there is one.
func readSecrets(vars map[string]string, environ []string) (problems []error) {
	credentials := lookup(environ, "CREDENTIALS_DIRECTORY")
	for f := range fields() {
		if f.Tag.Get("secret") == "" {
			continue
		}
		name := f.Tag.Get("env")
		key, file := Prefix+name, Prefix+name+"_FILE"
		path := vars[file]
		switch {
		case vars[key] != "" && path != "":
			problems = append(problems, &SettingError{file, path, key + " is set, too; set one of the two"})
			continue
		case vars[key] != "":
			continue
		case path == "" && credentials == "":
			continue
		case path == "":
			file = "CREDENTIALS_DIRECTORY"
			path = filepath.Join(credentials, strings.ReplaceAll(strings.ToLower(name), "_", "-"))
			if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
				continue // a credential need not be there
			}
		}
		secret, err := readSecret(path)
		if err != nil {
			problems = append(problems, &SettingError{file, path, err.Error()})
		}
		vars[key] = secret
	}
	return problems
}

// readSecret reads a file that holds nothing but a secret, and perhaps a line feed behind it.
func readSecret(path string) (string, error) {
	b, _, err := certs.ReadFile(path, maxSecret)
	switch {
	case errors.Is(err, certs.ErrNotRegular):
		return "", errors.New("not a regular file; write the path of one that holds the secret")
	case errors.Is(err, certs.ErrTooLarge):
		return "", fmt.Errorf("more than %d bytes; a file with the secret alone is expected", maxSecret)
	case err != nil:
		return "", fmt.Errorf("%w; write the path of a file that user %d may read", err, os.Geteuid())
	}
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" || strings.ContainsAny(secret, "\r\n\x00") {
		return "", errors.New("not one line with the secret; write it with: printf %s SECRET")
	}
	return secret, nil
}

// lookup is a variable of the environment, of two the last one.
func lookup(environ []string, key string) (value string) {
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			value = v
		}
	}
	return value
}

// Kubernetes and Docker tell each container where a service is, in variables that begin with the service's name
// (kubernetes.io/docs/concepts/services-networking/service, "Environment variables").
var (
	serviceHost = regexp.MustCompile(`_SERVICE_HOST$|_PORT_\d+_(TCP|UDP|SCTP)_ADDR$`)
	servicePort = regexp.MustCompile(`_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)_PORT$`)
	serviceURL  = regexp.MustCompile(`_PORT(_\d+_(TCP|UDP|SCTP))?$`)
	serviceKind = regexp.MustCompile(`_PORT_\d+_(TCP|UDP|SCTP)_PROTO$`)

	isPort = regexp.MustCompile(`^\d{1,5}$`)
	isURL  = regexp.MustCompile(`^(tcp|udp|sctp)://\S+:\d{1,5}$`)
	isKind = regexp.MustCompile(`^(tcp|udp|sctp)$`)
)

// isServiceLink says whether a variable tells of a service called tlsnat, or tlsnat-SOMETHING: name and value both have to
// have the shape, so that TLSNAT_PORT=443 stays the slip that it is.
func isServiceLink(key, value string) bool {
	switch {
	case value == "": // of a service without an address (headless)
		return serviceHost.MatchString(key) || servicePort.MatchString(key) || serviceURL.MatchString(key)
	case serviceHost.MatchString(key):
		_, err := netip.ParseAddr(value)
		return err == nil
	case serviceKind.MatchString(key):
		return isKind.MatchString(value)
	case servicePort.MatchString(key):
		return isPort.MatchString(value)
	}
	return serviceURL.MatchString(key) && isURL.MatchString(value)
}

// Configured says whether the environment has a setting. What Kubernetes says of a service is none.
func Configured(environ []string) bool {
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(key, Prefix) && !isServiceLink(key, value) {
			return true
		}
	}
	return false
}
