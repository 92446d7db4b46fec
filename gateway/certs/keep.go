// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"path/filepath"
	"slices"
)

// spared are the certificates of the store that were not read again because of a file that cannot be used. It is the
// certificate's own file, its key's, or their directory; or the certificate's file is gone, and one that cannot be
// used stands in its directory: it may be the renewed one under another name.
func (s *Store) spared(read []*Certificate, paths []string, r report) (spared []*Certificate) {
	if s == nil || !slices.ContainsFunc(r, Problem.fatal) {
		return nil
	}
	there, spoiled, spoiledDir := make(map[string]bool), make(map[string]bool), make(map[string]bool)
	for _, p := range paths {
		there[p] = true
	}
	for _, p := range r {
		if p.fatal() {
			spoiled[p.File], spoiledDir[filepath.Dir(p.File)] = true, true
		}
	}
	again := make(map[string]bool)
	for _, c := range read {
		again[string(c.pair.Certificate[0])] = true
	}
	for _, c := range s.certs {
		certDir, keyDir := filepath.Dir(c.CertFile), filepath.Dir(c.KeyFile)
		lost := spoiled[c.CertFile] || spoiled[c.KeyFile] || spoiled[certDir] || spoiled[keyDir] || !there[c.CertFile] && spoiledDir[certDir]
		if lost && !again[string(c.pair.Certificate[0])] {
			kept := *c // connections of the generation before read the other one
			kept.Kept = true
			spared = append(spared, &kept)
		}
	}
	return spared
}

// warnKept names the certificates that are served though their files cannot be used.
func warnKept(kept, served []*Certificate, r *report) {
	for _, c := range kept {
		if slices.Contains(served, c) {
			r.warn(place{file: c.CertFile}, "", "%s is still served with the certificate that was read before; it expires %s", title(c.pair.Leaf), day(c.NotAfter))
		}
	}
}
