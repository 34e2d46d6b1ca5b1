//! Small guests, put together from text.
//!
//! A [`Wat`] has all of `kube_v1` and `host_v1` imported, a memory, and an `alloc` that always
//! returns the same buffer: its guests are done with a payload when they return. What they find
//! out they log as `KEY=VALUE`, so that tests compare in Rust.
//!
//! Code is written in the stack style: `i32.const 1 i32.const 2 i32.add`. Inside `on_event` there
//! are `$op`, `$kind`, `$ptr` and `$len`, and the locals `$i`, `$j` (i32) and `$n`, `$m` (i64).
//!
//! | memory | |
//! |---|---|
//! | 0 to 1,023 | for results of host functions |
//! | 1,024 to 65,535 | texts |
//! | 65,536 to 131,071 | lines to be logged |
//! | from 131,072 | the payload |

use std::fmt::Write;

/// What an event is about.
pub mod kind {
    /// The first event.
    pub const START: u32 = 1;
    /// Asked to stop.
    pub const STOP: u32 = 2;
    /// The deadline has come.
    pub const TIMER: u32 = 3;
    /// A typed verb's answer.
    pub const RESULT: u32 = 4;
    /// One step of a watch.
    pub const ITEM: u32 = 5;
    /// Status and headers of a raw answer.
    pub const HEAD: u32 = 6;
    /// Part of a raw answer.
    pub const DATA: u32 = 7;
    /// The end of a raw answer.
    pub const END: u32 = 8;
    /// A failure.
    pub const ERROR: u32 = 9;
}

const TEXTS: usize = 1024;
const LINE: usize = 65_536;
/// Where payloads are.
pub const PAYLOAD: usize = 131_072;

const PRELUDE: &str = r#"
  (memory (export "memory") 4)
  (global $at (mut i32) (i32.const 65536))

  ;; Puts bytes into the line. Too long lines are cut.
  (func $put (param $ptr i32) (param $len i32)
    (local $room i32)
    (local.set $room (i32.sub (i32.const 125000) (global.get $at)))
    (if (i32.gt_u (local.get $len) (local.get $room)) (then (local.set $len (local.get $room))))
    (memory.copy (global.get $at) (local.get $ptr) (local.get $len))
    (global.set $at (i32.add (global.get $at) (local.get $len))))
  (func $put_byte (param $byte i32)
    (i32.store8 (global.get $at) (local.get $byte))
    (global.set $at (i32.add (global.get $at) (i32.const 1))))
  (func $put_digits (param $n i64)
    (if (i64.ge_u (local.get $n) (i64.const 10))
      (then (call $put_digits (i64.div_u (local.get $n) (i64.const 10)))))
    (call $put_byte (i32.add (i32.const 48) (i32.wrap_i64 (i64.rem_u (local.get $n) (i64.const 10))))))
  (func $put_number (param $n i64)
    (if (i64.lt_s (local.get $n) (i64.const 0))
      (then
        (call $put_byte (i32.const 45))
        (local.set $n (i64.sub (i64.const 0) (local.get $n)))))
    (call $put_digits (local.get $n)))
  ;; Logs the line at level info.
  (func $flush
    (drop (call $log (i32.const 3) (i32.const 65536) (i32.sub (global.get $at) (i32.const 65536))))
    (global.set $at (i32.const 65536)))
  ;; A line of text.
  (func $say (param $ptr i32) (param $len i32)
    (call $put (local.get $ptr) (local.get $len)) (call $flush))
  ;; TEXT=NUMBER. The number comes first, for use after a call.
  (func $say64 (param $n i64) (param $ptr i32) (param $len i32)
    (call $put (local.get $ptr) (local.get $len))
    (call $put_byte (i32.const 61)) (call $put_number (local.get $n)) (call $flush))
  (func $say32 (param $n i32) (param $ptr i32) (param $len i32)
    (call $say64 (i64.extend_i32_s (local.get $n)) (local.get $ptr) (local.get $len)))
  ;; TEXT=BYTES.
  (func $say_bytes (param $bytes i32) (param $count i32) (param $ptr i32) (param $len i32)
    (call $put (local.get $ptr) (local.get $len)) (call $put_byte (i32.const 61))
    (call $put (local.get $bytes) (local.get $count)) (call $flush))
  ;; Where the needle ends in the hay; 0 when it is not there.
  (func $find (param $hay i32) (param $hay_len i32) (param $needle i32) (param $len i32) (result i32)
    (local $end i32) (local $i i32)
    (local.set $end (i32.add (local.get $hay) (local.get $hay_len)))
    (loop $next
      (if (i32.gt_u (i32.add (local.get $hay) (local.get $len)) (local.get $end)) (then (return (i32.const 0))))
      (local.set $i (i32.const 0))
      (block $differs
        (loop $compare
          (if (i32.eq (local.get $i) (local.get $len))
            (then (return (i32.add (local.get $hay) (local.get $len)))))
          (br_if $differs (i32.ne
            (i32.load8_u (i32.add (local.get $hay) (local.get $i)))
            (i32.load8_u (i32.add (local.get $needle) (local.get $i)))))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br $compare)))
      (local.set $hay (i32.add (local.get $hay) (i32.const 1)))
      (br $next))
    (i32.const 0))
"#;

const ALLOC: &str = r"
    (local $end i32)
    (local.set $end (i32.add (i32.const 131072) (local.get $len)))
    (if (i32.gt_u (local.get $end) (i32.mul (memory.size) (i32.const 65536)))
      (then (drop (memory.grow (i32.sub
        (i32.div_u (i32.add (local.get $end) (i32.const 65535)) (i32.const 65536)) (memory.size))))))
    (i32.const 131072)";

/// A guest in the making.
pub struct Wat {
    imports: String,
    texts: Vec<u8>,
    functions: String,
    initialize: String,
    alloc: String,
    on_event: String,
}

impl Default for Wat {
    fn default() -> Self {
        let mut imports = String::new();
        for verb in [
            "get", "list", "watch", "create", "replace", "patch", "delete", "request",
        ] {
            let import = format!(
                "(import \"kube_v1\" \"{verb}\" (func ${verb} (param i32 i32) (result i64)))\n"
            );
            imports.push_str(&import);
        }
        imports.push_str(
            r#"(import "host_v1" "timer" (func $timer (param i64) (result i32)))
(import "host_v1" "cancel" (func $cancel (param i64) (result i32)))
(import "host_v1" "log" (func $log (param i32 i32 i32) (result i32)))
"#,
        );
        Self {
            imports,
            texts: Vec::new(),
            functions: String::new(),
            initialize: String::new(),
            alloc: ALLOC.to_owned(),
            on_event: String::new(),
        }
    }
}

impl Wat {
    /// Imports a function of WASI under its own name.
    pub fn wasi(&mut self, name: &str, ty: &str) -> &mut Self {
        self.import("wasi_snapshot_preview1", name, ty)
    }

    /// Imports a function under its own name.
    pub fn import(&mut self, module: &str, name: &str, ty: &str) -> &mut Self {
        writeln!(
            self.imports,
            "(import \"{module}\" \"{name}\" (func ${name} {ty}))"
        )
        .unwrap();
        self
    }

    /// Keeps bytes in the guest's memory; the code that pushes their pointer and length.
    pub fn text(&mut self, bytes: impl AsRef<[u8]>) -> String {
        let (at, length) = self.place(bytes);
        format!(" i32.const {at} i32.const {length} ")
    }

    /// Keeps bytes in the guest's memory; their place and length.
    pub fn place(&mut self, bytes: impl AsRef<[u8]>) -> (usize, usize) {
        // Tables of structures want to be aligned.
        self.texts.resize(self.texts.len().next_multiple_of(8), 0);
        let at = TEXTS + self.texts.len();
        self.texts.extend_from_slice(bytes.as_ref());
        assert!(
            TEXTS + self.texts.len() <= LINE,
            "too much text for a test guest"
        );
        (at, bytes.as_ref().len())
    }

    /// Code that logs a text.
    pub fn say(&mut self, text: &str) -> String {
        format!("{} call $say\n", self.text(text))
    }

    /// Code that logs `KEY=NUMBER` with the i32 on the stack.
    pub fn say32(&mut self, key: &str) -> String {
        format!("{} call $say32\n", self.text(key))
    }

    /// Code that logs `KEY=NUMBER` with the i64 on the stack.
    pub fn say64(&mut self, key: &str) -> String {
        format!("{} call $say64\n", self.text(key))
    }

    /// Adds functions, globals and the like.
    pub fn functions(&mut self, text: &str) -> &mut Self {
        self.functions.push_str(text);
        self
    }

    /// Adds to what `_initialize` does.
    pub fn initialize(&mut self, code: &str) -> &mut Self {
        self.initialize.push_str(code);
        self
    }

    /// Replaces the body of `alloc`, whose parameter is `$len`.
    pub fn alloc(&mut self, code: &str) -> &mut Self {
        code.clone_into(&mut self.alloc);
        self
    }

    /// Adds code for one kind of event.
    pub fn on(&mut self, kind: u32, code: &str) -> &mut Self {
        writeln!(
            self.on_event,
            "local.get $kind i32.const {kind} i32.eq if\n{code}\nend"
        )
        .unwrap();
        self
    }

    /// Adds code for every event.
    pub fn on_any(&mut self, code: &str) -> &mut Self {
        self.on_event.push_str(code);
        self.on_event.push('\n');
        self
    }

    /// The module.
    pub fn build(&self) -> Vec<u8> {
        let mut data = String::new();
        for byte in &self.texts {
            write!(data, "\\{byte:02x}").unwrap();
        }
        let Self {
            imports,
            functions,
            initialize,
            alloc,
            on_event,
            ..
        } = self;
        let text = format!(
            r#"(module
{imports}{PRELUDE}{functions}
  (data (i32.const {TEXTS}) "{data}")
  (func (export "_initialize") (local $i i32) (local $j i32) (local $n i64) (local $m i64)
{initialize})
  (func (export "alloc") (param $len i32) (result i32)
{alloc})
  (func (export "on_event") (param $op i64) (param $kind i32) (param $ptr i32) (param $len i32)
    (local $i i32) (local $j i32) (local $n i64) (local $m i64)
{on_event}))"#
        );
        wat::parse_str(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }
}

/// A neighbour: does nothing but log `tick=1`, `tick=2`, ... ten times a second, until it is asked
/// to stop.
pub fn ticking() -> Vec<u8> {
    let mut wat = ticker();
    wat.wasi("proc_exit", "(param i32)");
    wat.on(kind::STOP, "i32.const 0 call $proc_exit");
    wat.build()
}

/// The same, but deaf to `stop`.
pub fn stubborn() -> Vec<u8> {
    ticker().build()
}

fn ticker() -> Wat {
    let mut wat = Wat::default();
    let tick = wat.say32("tick");
    wat.functions("(global $ticks (mut i32) (i32.const 0))");
    wat.on(
        kind::TIMER,
        &format!(
            "global.get $ticks i32.const 1 i32.add global.set $ticks global.get $ticks {tick}"
        ),
    );
    wat.on_any("i64.const 100000000 call $timer drop");
    wat
}
