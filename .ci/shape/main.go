// SPDX-License-Identifier: Apache-2.0

// Shape measures how a package of this module is built, and fails if it is not as it should be:
//
//	go run ./.ci/shape            # package gateway, against the limits
//	go run ./.ci/shape -v         # and what each figure is made of
//
// It counts files and lines without tests, methods of conn, places where a connection's stage is set, lengths of functions,
// and references between files that run against the order of the files: from a file to one that stands before it in
// the list of order.txt, which goes from the story of a connection down to what it is made of. A reference is one file's
// use of one function, type, variable or method of another file.
package main

import (
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// limits are the most that there may be.
var limits = map[string]int{
	"files": 32, "lines": 8000, "methods of conn": 90, "functions that set stage": 1,
	"references against the order": 100, "median function": 11, "95 % of functions": 40, "longest function": 70,
}

//go:embed order.txt
var order string

func main() {
	verbose := flag.Bool("v", false, "say what each figure is made of")
	report := flag.Bool("report", false, "only print: exit 0 whatever the figures are")
	flag.Parse()
	p, err := load("./gateway")
	if err != nil {
		fmt.Fprintln(os.Stderr, "shape:", err)
		os.Exit(3)
	}
	bad := false
	for _, f := range p.figures() {
		mark := ""
		if f.n > limits[f.name] {
			mark, bad = fmt.Sprintf("   MORE THAN %d", limits[f.name]), true
		}
		fmt.Printf("%-30s %5d%s\n", f.name, f.n, mark)
		if *verbose {
			for _, line := range f.of {
				fmt.Println("    " + line)
			}
		}
	}
	if bad && !*report {
		os.Exit(1)
	}
}

type pkg struct {
	fset  *token.FileSet
	files []*ast.File
	info  *types.Info
	types *types.Package
}

// load parses and checks a package without its tests. What it imports is taken from the build cache.
func load(path string) (*pkg, error) {
	list := exec.Command("go", "list", "-export", "-deps", "-json=ImportPath,Export,Dir,GoFiles,DepOnly", path)
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	exports := map[string]string{}
	p := &pkg{fset: token.NewFileSet(), info: &types.Info{Uses: map[*ast.Ident]types.Object{}, Types: map[ast.Expr]types.TypeAndValue{}, Defs: map[*ast.Ident]types.Object{}}}
	name := ""
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var one struct {
			ImportPath, Export, Dir string
			GoFiles                 []string
			DepOnly                 bool
		}
		if err := d.Decode(&one); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		exports[one.ImportPath] = one.Export
		if one.DepOnly {
			continue
		}
		name = one.ImportPath
		for _, f := range one.GoFiles {
			file, err := parser.ParseFile(p.fset, filepath.Join(one.Dir, f), nil, parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			p.files = append(p.files, file)
		}
	}
	config := types.Config{Importer: importer.ForCompiler(p.fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })}
	p.types, err = config.Check(name, p.fset, p.files, p.info)
	return p, err
}

// figure is one number, and what it is made of.
type figure struct {
	name string
	n    int
	of   []string
}

func (p *pkg) figures() []figure {
	lines := figure{name: "lines"}
	for _, f := range p.files {
		n := p.fset.Position(f.FileEnd).Line
		lines.n += n
		lines.of = append(lines.of, fmt.Sprintf("%5d %s", n, p.file(f.Pos())))
	}
	slices.Sort(lines.of)
	all := []figure{{name: "files", n: len(p.files)}, lines, p.methodsOf("conn"), p.settersOf("conn", "stage"), p.against()}
	return append(all, p.lengths()...)
}

func (p *pkg) file(pos token.Pos) string { return filepath.Base(p.fset.Position(pos).Filename) }

func (p *pkg) functions(do func(*ast.FuncDecl)) {
	for _, f := range p.files {
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && d.Body != nil {
				do(d)
			}
		}
	}
}

func (p *pkg) methodsOf(receiver string) figure {
	f := figure{name: "methods of " + receiver}
	p.functions(func(d *ast.FuncDecl) {
		if d.Recv != nil && strings.TrimPrefix(types.ExprString(d.Recv.List[0].Type), "*") == receiver {
			f.n++
			f.of = append(f.of, p.file(d.Pos())+" "+d.Name.Name)
		}
	})
	slices.Sort(f.of)
	return f
}

// settersOf are the functions that assign to a field of a type.
func (p *pkg) settersOf(of, field string) figure {
	f := figure{name: "functions that set " + field}
	p.functions(func(d *ast.FuncDecl) {
		sets := false
		ast.Inspect(d, func(n ast.Node) bool {
			if a, ok := n.(*ast.AssignStmt); ok {
				for _, x := range a.Lhs {
					if s, ok := x.(*ast.SelectorExpr); ok && s.Sel.Name == field && p.isA(s.X, of) {
						sets = true
					}
				}
			}
			return true
		})
		if sets {
			f.n++
			f.of = append(f.of, p.file(d.Pos())+" "+d.Name.Name)
		}
	})
	return f
}

// isA says whether an expression is of the type, or points to one.
func (p *pkg) isA(x ast.Expr, name string) bool {
	t := p.info.TypeOf(x)
	if pointer, ok := t.(*types.Pointer); ok {
		t = pointer.Elem()
	}
	named, ok := t.(*types.Named)
	return ok && named.Obj().Name() == name && named.Obj().Pkg() == p.types
}

// against are the references from a file to one that stands before it.
func (p *pkg) against() figure {
	f := figure{name: "references against the order"}
	rank := map[string]int{}
	for i, name := range strings.Fields(order) {
		rank[name+".go"] = i + 1
	}
	seen := map[string]bool{}
	for id, o := range p.info.Uses {
		if o.Pkg() != p.types {
			continue
		}
		if v, ok := o.(*types.Var); ok && (v.IsField() || v.Parent() != p.types.Scope()) {
			continue // a field belongs to its type
		}
		from, to := p.file(id.Pos()), p.file(o.Pos())
		if rank[from] == 0 {
			f.of = append(f.of, from+" is not in order.txt")
			rank[from] = len(rank) + 1
		}
		line := fmt.Sprintf("%s uses %s of %s", from, o.Name(), to)
		if rank[to] < rank[from] && !seen[line] {
			seen[line] = true
			f.n++
			f.of = append(f.of, line)
		}
	}
	slices.Sort(f.of)
	return f
}

func (p *pkg) lengths() []figure {
	var all []int
	var long []string
	p.functions(func(d *ast.FuncDecl) {
		n := p.fset.Position(d.End()).Line - p.fset.Position(d.Pos()).Line + 1
		if all = append(all, n); n > 40 {
			long = append(long, fmt.Sprintf("%d %s %s", n, p.file(d.Pos()), d.Name.Name))
		}
	})
	slices.Sort(all)
	slices.Sort(long)
	return []figure{
		{"median function", all[len(all)/2], nil},
		{"95 % of functions", all[len(all)*95/100], nil},
		{"longest function", all[len(all)-1], long},
	}
}
