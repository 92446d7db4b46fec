// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tlsnat/tlsnat/natmap"
)

// behaviours are tests of what options do, of a running gateway or of the sockets that it makes. A test has the option in
// its map.
var behaviours = map[string]string{
	"mode":           "TestProxyHeaderIsBelieved",
	"proxy":          "TestProxyHeaderToBackend",
	"idle":           "TestTimersOfARuleEndItsConnections",
	"connect":        "TestSilentBackendIsGivenUp",
	"linger":         "TestTimersOfARuleEndItsConnections",
	"lifetime":       "TestTimersOfARuleEndItsConnections",
	"drain":          "TestDrainOptionEndsConnectionsOfARemovedRule",
	"min-tls":        "TestOldVersionIsRefused",
	"alpn":           "TestALPNIsAgreedOn",
	"cert":           "TestClientWithoutAName",
	"ktls":           "TestKTLSOffIsOff",
	"truncation":     "TestTruncationOption",
	"https-port":     "TestRedirectToHTTPS",
	"backend-ca":     "TestBackendIsVerified",
	"backend-name":   "TestBackendIsVerified",
	"backend-cert":   "TestOpenSSLBackendOverEverySuite",
	"backend-verify": "TestBackendIsVerified",
	"balance":        "TestConnectionsFollowTheWeights",
	"max-conns":      "TestConnectionsWaitForRoom",
	"queue":          "TestConnectionsWaitForRoom",
	"retries":        "TestRestartIsBridged",
	"eject":          "TestRestartIsBridged",
	"check":          "TestChecksTakeBackendsOutAndIn",
	"every":          "TestChecksTakeBackendsOutAndIn",
	"rise":           "TestChecksTakeBackendsOutAndIn",
	"fall":           "TestChecksTakeBackendsOutAndIn",
	"slow-start":     "TestKilledBackendCostsOnlyItsConnections",
	"on-down":        "TestConnectionsOfADownBackendAreCut",
	"resolve-to":     "TestDNSDoesNotLeadToLoopback",
	"source":         "TestBackendsSeeTheSource",
	"keepalive":      "TestSocketsAreAsTheRuleWants",
	"user-timeout":   "TestSocketsAreAsTheRuleWants",
	"dscp":           "TestSocketsAreAsTheRuleWants",
	"mptcp":          "TestMultipathCarriesStreams",
	"fastopen":       "TestFirstBytesGoWithTheSYN",
	"allow":          "TestRuleOfTheNameDecides",
	"deny":           "TestDeniedIsResetBeforeItSpeaks",
	"conns-per-ip":   "TestConnsPerIPHoldsOverLoops",
	"rate-per-ip":    "TestRatePerIPHoldsOverLoops",
	"conns":          "TestConnsOfALine",
	"handshakes":     "TestHandshakesOfALine",
	"bandwidth":      "TestBandwidthIsWhatItSays",
	"starttls":       "TestSClientStartsTLS",
	"forward-tlvs":   "TestTLVsOfLoadBalancerAreForwardedAndLogged",
	"log-tlvs":       "TestTLVsOfLoadBalancerAreForwardedAndLogged",
}

// TestEveryOptionIsTestedAndDocumented: what it does has a test that uses it, it has a row in the reference, and a
// case in which explain says where it was written and one in which it says what holds without it.
func TestEveryOptionIsTestedAndDocumented(t *testing.T) {
	tests, text, explained := gatewayTests(t), document(t, optionPage), explanations(t)
	var keys []string
	for _, o := range natmap.OptionDocs() {
		keys = append(keys, o.Key)
		assigned := regexp.MustCompile(`(^|[^a-z-])` + o.Key + `=`)
		switch test := behaviours[o.Key]; {
		case test == "":
			t.Errorf("%s= has no test of what it does", o.Key)
		case !assigned.MatchString(tests[test]):
			t.Errorf("%s= stands in no map of %s, if there is such a test", o.Key, test)
		}
		if !strings.Contains(text, "\n| `"+o.Key+"=") {
			t.Errorf("%s= has no row in the reference", o.Key)
		}
		for _, from := range []string{"the rule, |default line, ", "built in|default of TLSNAT_"} {
			if !regexp.MustCompile(`(?m)^(options)? +` + o.Key + `=.* {2,}(` + from + `)`).MatchString(explained) {
				t.Errorf("no case of explain has %s= of: %s", o.Key, from)
			}
		}
	}
	for key := range behaviours {
		if !slices.Contains(keys, key) {
			t.Errorf("there is no option %s= any more", key)
		}
	}
}

// gatewayTests are the texts of the gateway's tests, by name.
func gatewayTests(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	files, err := filepath.Glob(filepath.Join(root, "gateway", "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		set := token.NewFileSet()
		tree, err := parser.ParseFile(set, file, text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range tree.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Test") {
				all[f.Name.Name] = string(text[set.Position(f.Body.Pos()).Offset:set.Position(f.Body.End()).Offset])
			}
		}
	}
	return all
}

// explanations is what explain says in all its cases.
func explanations(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob("testdata/explain/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, said, _ := strings.Cut(string(text), "-- stdout --\n")
		all.WriteString(said)
	}
	return all.String()
}
