// SPDX-License-Identifier: Apache-2.0

package admin_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
)

// browser is a chromium that looks at the page. It is told what to do over a pair of pipes, in the DevTools protocol:
// messages of JSON, each with a zero byte behind it.
type browser struct {
	to      *os.File
	session string

	mu       sync.Mutex
	next     int
	answers  map[int]chan json.RawMessage
	mistakes []string // what the page's console has of errors
}

// browse opens the page.
func (b *bed) browse(t *testing.T) *browser {
	t.Helper()
	chromium := program(t, "chromium")
	toRead, toWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fromRead, fromWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--no-default-browser-check",
		"--window-size=1300,1600", "--user-data-dir="+profile(t), "--remote-debugging-pipe")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Env = append(os.Environ(), "HOME="+profile(t), "TMPDIR="+profile(t))
	cmd.ExtraFiles = []*os.File{toRead, fromWrite} // descriptors 3 and 4, as --remote-debugging-pipe has it
	started := make(chan error)
	go func() { // Pdeathsig is bound to the thread that starts it
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			<-t.Context().Done()
			_ = cmd.Wait()
		}
		close(started)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	_ = toRead.Close()
	_ = fromWrite.Close()
	t.Cleanup(func() {
		<-started
		_ = toWrite.Close()
		_ = fromRead.Close()
	})
	w := &browser{to: toWrite, answers: map[int]chan json.RawMessage{}}
	go w.listen(fromRead)
	var target struct{ TargetID, SessionID string }
	w.tell(t, "Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	w.tell(t, "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &target)
	w.session = target.SessionID
	w.tell(t, "Runtime.enable", nil, nil)
	w.tell(t, "Log.enable", nil, nil)
	w.tell(t, "Page.navigate", map[string]any{"url": b.url("/")}, nil)
	return w
}

// profile is a directory for a browser. Its processes end a moment after the one that was started, and write until then.
func profile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "browser-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for began := time.Now(); os.RemoveAll(dir) != nil; time.Sleep(20 * time.Millisecond) {
			if time.Since(began) > 10*time.Second {
				t.Errorf("%s is still written to", dir)
				return
			}
		}
	})
	return dir
}

// listen hands answers to who waits for them, and notes what goes wrong on the page.
func (w *browser) listen(from *os.File) {
	r := bufio.NewReader(from)
	for {
		message, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m struct {
			ID     int
			Method string
			Result json.RawMessage
			Params json.RawMessage
		}
		if json.Unmarshal(bytes.TrimSuffix(message, []byte{0}), &m) != nil {
			continue
		}
		w.mu.Lock()
		switch {
		case m.ID != 0:
			w.answers[m.ID] <- m.Result
			delete(w.answers, m.ID)
		case m.Method == "Runtime.exceptionThrown", m.Method == "Log.entryAdded" && bytes.Contains(m.Params, []byte(`"level":"error"`)):
			w.mistakes = append(w.mistakes, string(m.Params))
		}
		w.mu.Unlock()
	}
}

// tell gives an order and waits until it is carried out.
func (w *browser) tell(t *testing.T, method string, params map[string]any, into any) {
	t.Helper()
	answer := make(chan json.RawMessage, 1)
	w.mu.Lock()
	w.next++
	id := w.next
	w.answers[id] = answer
	w.mu.Unlock()
	message := map[string]any{"id": id, "method": method, "params": params}
	if w.session != "" {
		message["sessionId"] = w.session
	}
	text, err := json.Marshal(message)
	if err == nil {
		_, err = w.to.Write(append(text, 0))
	}
	if err != nil {
		t.Fatal(err)
	}
	select {
	case result := <-answer:
		if into != nil {
			if err := json.Unmarshal(result, into); err != nil {
				t.Fatalf("%s: %v", method, err)
			}
		}
	case <-time.After(patience):
		t.Fatalf("%s: no answer", method)
	}
}

// eval is what an expression is worth on the page: a string.
func (w *browser) eval(t *testing.T, expression string) string {
	t.Helper()
	var a struct {
		Result struct{ Value any }
	}
	w.tell(t, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &a)
	return fmt.Sprint(a.Result.Value)
}

// await waits until an expression is true. The page looks every two seconds.
func (w *browser) await(t *testing.T, expression string) {
	t.Helper()
	for deadline := time.Now().Add(patience); w.eval(t, "Boolean("+expression+")") != "true"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never true: %s\n%s", expression, w.eval(t, "document.body.innerText"))
		}
	}
}

// press presses a key and lets it go.
func (w *browser) press(t *testing.T, key string, code int, text string) {
	t.Helper()
	for _, kind := range []string{"keyDown", "keyUp"} {
		params := map[string]any{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
		if kind == "keyDown" && text != "" {
			params["text"] = text
		}
		w.tell(t, "Input.dispatchKeyEvent", params, nil)
	}
}

// focus presses Tab until the button that is called so has the keyboard.
func (w *browser) focus(t *testing.T, label string) {
	t.Helper()
	for range 200 {
		w.press(t, "Tab", 9, "")
		if w.eval(t, "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent.trim()") == label {
			return
		}
	}
	t.Fatalf("Tab never comes to %q", label)
}

func (w *browser) enter(t *testing.T) {
	t.Helper()
	w.press(t, "Enter", 13, "\r")
}

// mustBeFlawless: no script has failed, and nothing was refused by the page's policy. What the browser says itself about
// an answer with the status is expected.
func (w *browser) mustBeFlawless(t *testing.T, status ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range w.mistakes {
		if !slices.ContainsFunc(status, func(s string) bool { return strings.Contains(m, "status of "+s) }) {
			t.Errorf("on the console: %s", m)
		}
	}
}

// row is the text of the row of a table that has a word in it.
func row(table, word string) string {
	return fmt.Sprintf("([...document.querySelectorAll('#%s tr')].find(r => r.textContent.includes(%q))?.textContent ?? '')", table, word)
}

// TestPageIsWorkedByKeyboard: a backend is drained and taken back, the configuration read again, outcomes are picked; the page
// shows what came of it without being loaded again, and the keyboard stays where it was.
func TestPageIsWorkedByKeyboard(t *testing.T) {
	b := start(t)
	b.mixed(t)
	w := b.browse(t)
	infos, _ := b.gateway.Backends(10)
	backend := infos[0].Address
	w.await(t, row("backends", backend)+".includes('up')")
	w.focus(t, "drain "+backend)
	w.enter(t)
	w.await(t, "document.getElementById('ask-token').open && document.activeElement.id === 'token'")
	if why := w.eval(t, "document.getElementById('token-why').textContent"); !strings.Contains(why, b.admin.TokenPath()) {
		t.Errorf("it does not say where the token is: %s", why)
	}
	w.tell(t, "Input.insertText", map[string]any{"text": "wrong"}, nil)
	w.enter(t)
	w.await(t, "document.getElementById('ask-token').open && document.getElementById('token-why').textContent.includes('was wrong')")
	w.tell(t, "Input.insertText", map[string]any{"text": b.token(t)}, nil)
	w.enter(t)
	w.await(t, row("backends", backend)+".includes('draining')")
	w.await(t, "document.getElementById('said').textContent.includes('no new connections')")
	if infos, _ := b.gateway.Backends(10); infos[0].State != "draining" {
		t.Errorf("%+v", infos)
	}
	if focused := w.eval(t, "document.activeElement.getAttribute('aria-label')"); !strings.HasSuffix(focused, " "+backend) {
		t.Errorf("the keyboard went to %q", focused)
	}
	if _, err := b.gateway.OrderBackend(backend, gateway.ReadyBackend); err != nil { // by somebody else
		t.Fatal(err)
	}
	w.await(t, row("backends", backend)+".includes('up')")

	w.focus(t, "Reload")
	w.enter(t)
	w.await(t, "document.getElementById('said').textContent.includes('reloaded: generation 2')")
	w.await(t, row("generations", "current")+".startsWith('2')")

	w.focus(t, "unknown_name 1")
	w.enter(t)
	w.await(t, "document.querySelectorAll('#ended tr').length === 1 && "+row("ended", "unknown.test"))
	if pressed := w.eval(t, "document.activeElement.getAttribute('aria-pressed')"); pressed != "true" {
		t.Errorf("aria-pressed is %s where the keyboard is", pressed)
	}
	if shown := w.eval(t, `printable('pay\u202e\u009b2J\u0000.example')`); shown != `pay\u202e\u009b2J\u0000.example` {
		t.Errorf("the page shows %q", shown)
	}
	w.mustBeFlawless(t, "401")
}

// TestPageSaysWhatIsWrong: of a reload that failed, and of a backend that is out.
func TestPageSaysWhatIsWrong(t *testing.T) {
	file := t.TempDir() + "/edge.natmap"
	write := func(format string, args ...any) {
		if err := os.WriteFile(file, fmt.Appendf(nil, format, args...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := freePort(t)
	b := startFrom(t, file, func(b *bed) {
		write("%s localhost -> demo\n%s -> %s mode=tcp check=tcp every=1s conns=1 retries=off", b.tls, b.plain, out)
	})
	w := b.browse(t)
	w.eval(t, fmt.Sprintf("sessionStorage.setItem('token', %q)", b.token(t)))
	w.await(t, row("backends", out)+".match(/down.*connection refused/)")
	w.await(t, "document.getElementById('backends-note').textContent === '1 down'")
	write("%s localhost -> demo\n%s -> nonsense", b.tls, b.plain)
	w.focus(t, "Reload")
	w.enter(t)
	w.await(t, "document.getElementById('said').textContent.includes('not reloaded, generation 1 is still served')")
	w.await(t, "document.getElementById('notice').textContent.includes('The last reload failed')")
	w.await(t, "document.getElementById('diff').textContent.includes('edge.natmap:2:')")
	write("%s localhost -> demo\n%s -> reject", b.tls, b.plain)
	w.focus(t, "Reload")
	w.enter(t)
	w.await(t, "document.getElementById('notice').hidden")
	w.await(t, fmt.Sprintf("document.getElementById('diff').textContent.includes('+ %s -> reject')", b.plain))
	for _, m := range w.mistakes {
		if !strings.Contains(m, "422") { // the browser's own line for a reload that failed
			t.Errorf("on the console: %s", m)
		}
	}
}

// contrasts finds text that stands out from its background by less than 4.5 to 1 (WCAG 2.2, 1.4.3). Buttons that can't be
// pressed are exempt.
const contrasts = `(() => {
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parts = c => c.match(/[\d.]+/g).map(Number);
  const background = e => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.disabled || !e.checkVisibility() || e.closest('script')) continue;
    const [a, b] = [light(parts(getComputedStyle(e).color).slice(0, 3)), light(background(e).slice(0, 3))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(e.tagName + ' ' + e.textContent.trim().slice(0, 30) + ' ' + ratio.toFixed(2));
  }
  return bad.join('; ');
})()`

// TestPageIsReadableInLightAndDark, and fits a telephone.
func TestPageIsReadableInLightAndDark(t *testing.T) {
	b := start(t)
	b.mixed(t)
	w := b.browse(t)
	for _, scheme := range []string{"light", "dark"} {
		w.tell(t, "Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
		w.await(t, row("ended", "unknown.test"))
		w.await(t, row("backends", "up"))
		if bad := w.eval(t, contrasts); bad != "" {
			t.Errorf("%s: %s", scheme, bad)
		}
	}
	if dark := w.eval(t, "getComputedStyle(document.body).backgroundColor"); dark == "rgb(245, 246, 246)" {
		t.Error("dark is light")
	}
	w.tell(t, "Emulation.setDeviceMetricsOverride", map[string]any{"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": true}, nil)
	if wide := w.eval(t, "document.documentElement.scrollWidth"); wide != "390" {
		t.Errorf("on 390 pixels it is %s wide", wide)
	}
	w.mustBeFlawless(t)
}
