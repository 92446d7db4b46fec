// SPDX-License-Identifier: Apache-2.0

package certs_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/tlsnat/tlsnat/gateway/certs"
)

func ExampleLoad() {
	store, problems := certs.Load("/etc/tlsnat/certs", time.Now())
	for _, p := range problems {
		fmt.Fprintln(os.Stderr, p)
	}
	_ = &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if e := store.ForName(strings.ToLower(chi.ServerName)); e != nil {
			return e.Select(chi)
		}
		return nil, errors.New("no certificate for this name")
	}}
}

func ExampleSelfSigned() {
	dir, err := os.MkdirTemp("", "tlsnat")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	store, err := certs.SelfSigned(dir, []string{"localhost", "127.0.0.1"}, time.Now())
	if err != nil {
		fmt.Println(err)
		return
	}
	entry := store.Only()
	fmt.Println(entry.Names, entry.Addrs, entry.Served(time.Now())[0].KeyType)
	// Output: [localhost] [127.0.0.1] ECDSA P-256
}
