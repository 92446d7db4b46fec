// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/tlsnat/tlsnat/gateway"
)

// docs are the files that users copy.
const docs = "../../docs"

// tool runs promtool and returns what it says; that it isn't content is an error.
func tool(t *testing.T, dir, stdin string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program(t, "promtool"), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestPromtoolFindsNothingWrong with the metrics of a gateway that has done everything once.
func TestPromtoolFindsNothingWrong(t *testing.T) {
	b := start(t)
	b.mixed(t)
	_, text := b.ask(t, "GET", "/metrics", nil)
	tool(t, "", text, "check", "metrics")
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "tlsnat_") && strings.Contains(line, "unknown.test") {
			t.Errorf("what a client says became a label: %s", line)
		}
	}
}

// family is one of the metrics, as Prometheus gathers them.
func (b *bed) family(t *testing.T, name string) []*dto.Metric {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(b.admin)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()
		}
	}
	t.Fatalf("no metric %s", name)
	return nil
}

// TestHistogramsAreNativeAndClassic: both kinds of buckets hold every duration.
func TestHistogramsAreNativeAndClassic(t *testing.T) {
	b := start(t)
	b.mixed(t)
	for name, want := range map[string]uint64{
		"tlsnat_handshake_duration_seconds": 4, "tlsnat_backend_connect_duration_seconds": 7,
		"tlsnat_connection_duration_seconds": 5, "tlsnat_backend_handshake_duration_seconds": 0,
	} {
		h := b.family(t, name)[0].GetHistogram()
		if h.GetSampleCount() != want {
			t.Errorf("%s: %d samples, want %d", name, h.GetSampleCount(), want)
		}
		native, count := h.GetZeroCount(), int64(0)
		for _, delta := range h.GetPositiveDelta() {
			count += delta
			native += uint64(count)
		}
		classic := h.GetBucket()
		if last := classic[len(classic)-1]; native != want || last.GetCumulativeCount() != want || h.GetSchema() != gateway.DurationSchema {
			t.Errorf("%s: %d in native buckets, %d up to %v s, want %d", name, native, last.GetCumulativeCount(), last.GetUpperBound(), want)
		}
		for i := 1; i < len(classic); i++ {
			if classic[i].GetCumulativeCount() < classic[i-1].GetCumulativeCount() || classic[i].GetUpperBound() <= classic[i-1].GetUpperBound() {
				t.Errorf("%s: %v", name, classic)
			}
		}
	}
	times := get[gateway.Status](t, b, "status").Times
	if h := times.Handshake; h.Count != 4 || h.P50MS <= 0 || h.P99MS < h.P50MS || h.MeanMS <= 0 {
		t.Errorf("%+v", h)
	}
	if times.Resumed.Count != 1 || times.Connect.Count != 7 || times.Connection.Count != 5 {
		t.Errorf("%+v", times)
	}
}

// TestBackendsBeyondTheBoundAreSummed: no map makes more series than Prometheus can bear, and the sums add up.
func TestBackendsBeyondTheBoundAreSummed(t *testing.T) {
	const all, bound = 1010, 1000
	backends := make([]string, all)
	for i := range backends {
		backends[i] = fmt.Sprintf("127.77.%d.%d:9", i/250, i%250+1) // nobody listens there
	}
	b := startWith(t, "{plain} -> "+strings.Join(backends, " ")+" mode=tcp eject=off retries=off")
	c, err := http.Get("http://" + b.plain)
	if err == nil {
		_ = c.Body.Close()
		t.Fatal("somebody answered")
	}
	for name, want := range map[string]int{"tlsnat_backend_up": bound, "tlsnat_backend_state": bound * len(gateway.StateWords),
		"tlsnat_backend_connections_total": bound + 1, "tlsnat_backend_connections_open": bound + 1} {
		if got := len(b.family(t, name)); got != want {
			t.Errorf("%s: %d series, want %d", name, got, want)
		}
	}
	if n := b.family(t, "tlsnat_backends_others")[0].GetGauge().GetValue(); n != all-bound {
		t.Errorf("%v others, want %d", n, all-bound)
	}
	failures, others := 0.0, 0.0
	for _, m := range b.family(t, "tlsnat_backend_connect_failures_total") {
		failures += m.GetCounter().GetValue()
		if m.GetLabel()[0].GetValue() == "others" {
			others = m.GetCounter().GetValue()
		}
	}
	if failures != all || others != all-bound {
		t.Errorf("%v failures, %v of others; want %d and %d", failures, others, all, all-bound)
	}
}

// TestAlertsAreOfMetricsThatThereAre, and fire when they should.
func TestAlertsAreOfMetricsThatThereAre(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{filepath.Join(docs, "alerts.yml"), filepath.Join(docs, "prometheus.yml"), "testdata/alerts_test.yml"} {
		text, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(file)), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tool(t, dir, "", "check", "rules", "alerts.yml")
	tool(t, dir, "", "check", "config", "prometheus.yml")
	tool(t, dir, "", "test", "rules", "alerts_test.yml")
	rules, err := os.ReadFile(filepath.Join(dir, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	b := start(t)
	b.mixed(t)
	_, metrics := b.ask(t, "GET", "/metrics", nil)
	names := regexp.MustCompile(`tlsnat_\w+`).FindAllString(string(rules), -1)
	if len(names) < 5 {
		t.Errorf("the rules are about %v", names)
	}
	for _, name := range names {
		if !strings.Contains(metrics, "\n# TYPE "+name+" ") {
			t.Errorf("there is no metric %s", name)
		}
	}
	for _, label := range regexp.MustCompile(`(state|reason)=~"([^"]+)"`).FindAllStringSubmatch(string(rules), -1) {
		for value := range strings.SplitSeq(label[2], "|") {
			if !strings.Contains(metrics, label[1]+`="`+value+`"`) {
				t.Errorf("no metric has %s=%q", label[1], value)
			}
		}
	}
}

// TestPrometheusScrapesTheGateway: the real one, with native histograms and without, and finds no alert.
func TestPrometheusScrapesTheGateway(t *testing.T) {
	b := start(t)
	b.mixed(t)
	for name, kind := range map[string]struct {
		args  []string
		query string
	}{
		"native":  {[]string{"--enable-feature=native-histograms"}, `histogram_quantile(0.5, tlsnat_handshake_duration_seconds{resumed="false"})`},
		"classic": {nil, `histogram_quantile(0.5, tlsnat_handshake_duration_seconds_bucket{resumed="false"})`},
	} {
		t.Run(name, func(t *testing.T) {
			p := b.prometheus(t, kind.args...)
			for query, as := range map[string]func(float64) bool{
				"up":                              func(v float64) bool { return v == 1 },
				"tlsnat_connections_open":         func(v float64) bool { return v == 2 },
				`tlsnat_backends{state="up"}`:     func(v float64) bool { return v == 1 },
				kind.query:                        func(v float64) bool { return v > 0.0001 && v < patience.Seconds() },
				"sum(tlsnat_loop_lag_seconds)":    func(v float64) bool { return v >= 0 },
				"count(ALERTS) or vector(0)":      func(v float64) bool { return v <= 1 }, // the demo's certificate may be young
				"count(tlsnat_connections_total)": func(v float64) bool { return v == 19 },
			} {
				p.await(t, query, as)
			}
		})
	}
}

// prom is a running Prometheus.
type prom struct{ url string }

// prometheus starts one that scrapes the gateway twice a second, as docs/prometheus.yml has it otherwise.
func (b *bed) prometheus(t *testing.T, args ...string) *prom {
	t.Helper()
	path, dir, addr := program(t, "prometheus"), t.TempDir(), freePort(t)
	config, err := os.ReadFile(filepath.Join(docs, "prometheus.yml"))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := filepath.Abs(filepath.Join(docs, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("127.0.0.1:9180", b.admin.Addr(), "15s", "500ms", "alerts.yml", rules).Replace(string(config))
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, append(args, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log logBook
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log.text())
		}
	})
	return &prom{"http://" + addr}
}

// await asks until there is an answer as it should be.
func (p *prom) await(t *testing.T, query string, as func(float64) bool) {
	t.Helper()
	value := math.NaN()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if value = p.ask(query); as(value) {
			return
		}
	}
	t.Errorf("%s is %v", query, value)
}

// ask is the value of a query, or NaN as long as there is none.
func (p *prom) ask(query string) float64 {
	var a struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	response, err := http.Get(p.url + "/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return math.NaN()
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(&a); err != nil || len(a.Data.Result) != 1 {
		return math.NaN()
	}
	v, err := strconv.ParseFloat(fmt.Sprint(a.Data.Result[0].Value[1]), 64)
	if err != nil {
		return math.NaN()
	}
	return v
}
