// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
)

// The page is one file: it loads nothing from anywhere, and asks the API for what it shows.
//
//go:embed page.html
var pageHTML []byte

var thePage = newPage(pageHTML)

// page is the file and what a browser may do with it: run the script and apply the style that are in it, known by
// their hashes, and ask its own server. Names and addresses on it come from strangers; should one ever get into the
// markup, it does nothing.
type page struct {
	html   []byte
	policy string
}

func newPage(html []byte) *page {
	return &page{html, strings.Join([]string{
		"default-src 'none'",
		"script-src " + hashOf(html, "script"),
		"style-src " + hashOf(html, "style"),
		"img-src data:",
		"connect-src 'self'",
		"base-uri 'none'",
		"form-action 'none'",
		"frame-ancestors 'none'",
		"require-trusted-types-for 'script'",
	}, "; ")}
}

// hashOf is the CSP source of the one element with the tag.
func hashOf(html []byte, tag string) string {
	_, rest, _ := bytes.Cut(html, []byte("<"+tag+">"))
	content, _, _ := bytes.Cut(rest, []byte("</"+tag+">"))
	sum := sha256.Sum256(content)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func (p *page) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", p.policy)
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(p.html)))
	_, _ = w.Write(p.html)
}
