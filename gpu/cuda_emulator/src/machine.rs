//! Runs a kernel: block after block, each thread until it has to meet others.

use std::collections::{BTreeMap, VecDeque};

use half::{bf16, f16};

use crate::parse::{Arithmetic, Compare, Kernel, Op, Rounding, Source, Space, Type};

/// Why a kernel stopped.
pub(crate) type Trap = String;

/// Blocks of device memory: first address and size.
pub(crate) type Allocations = BTreeMap<u64, usize>;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Status {
    Running,
    /// At an instruction that the warp or the block does together.
    Waiting,
    Done,
}

struct Thread {
    registers: Vec<u64>,
    pc: usize,
    status: Status,
    index: u32,
    /// Copies on their way: those of closed groups, and of the open one.
    closed: VecDeque<Vec<(u64, u64, usize)>>,
    open: Vec<(u64, u64, usize)>,
    /// The block of memory that was used last.
    last: (u64, u64),
}

struct Block<'a> {
    kernel: &'a Kernel,
    parameter: &'a [u8],
    memory: &'a Allocations,
    shared: Vec<u8>,
    at: [u32; 3],
    grid: [u32; 3],
    threads: u32,
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn masked(value: u64, bits: u32) -> u64 {
    if bits == 64 { value } else { value & ((1 << bits) - 1) }
}

fn signed(value: u64, bits: u32) -> i64 {
    (value << (64 - bits)) as i64 >> (64 - bits)
}

impl Block<'_> {
    fn get(&self, thread: &Thread, source: Source) -> u64 {
        match source {
            Source::Register(r) => thread.registers[r as usize],
            Source::Immediate(v) => v,
            Source::Special(0) => thread.index.into(),
            Source::Special(3) => self.threads.into(),
            Source::Special(i @ 6..=8) => self.at[i as usize - 6].into(),
            Source::Special(i @ 9..=11) => self.grid[i as usize - 9].into(),
            Source::Special(4 | 5) => 1,
            Source::Special(12) => (thread.index % 32).into(),
            Source::Special(_) => 0,
        }
    }

    /// A checked host address of `bytes` bytes.
    fn address(&mut self, thread: &mut Thread, space: Space, at: u64, bytes: usize) -> Result<*mut u8, Trap> {
        if !at.is_multiple_of(bytes as u64) {
            return Err(format!("{space:?} address {at:#x} is no multiple of {bytes}"));
        }
        let end = at.checked_add(bytes as u64).ok_or("an address past the end")?;
        match space {
            Space::Param if end <= self.parameter.len() as u64 => {
                Ok(self.parameter.as_ptr().cast_mut().wrapping_add(at as usize))
            }
            Space::Shared if end <= self.shared.len() as u64 => Ok(self.shared.as_mut_ptr().wrapping_add(at as usize)),
            Space::Global => {
                if at < thread.last.0 || end > thread.last.1 {
                    let block = self.memory.range(..=at).next_back();
                    let (&start, &size) = block.ok_or_else(|| format!("global address {at:#x} is nobody's"))?;
                    if end > start + size as u64 {
                        return Err(format!(
                            "global address {at:#x} is {} bytes past a block",
                            end - start - size as u64
                        ));
                    }
                    thread.last = (start, start + size as u64);
                }
                Ok(at as *mut u8)
            }
            _ => Err(format!("{space:?} address {at:#x} is past the end")),
        }
    }

    fn read(&mut self, thread: &mut Thread, space: Space, at: u64, bytes: usize) -> Result<u64, Trap> {
        let from = self.address(thread, space, at, bytes)?;
        let mut value = [0; 8];
        // SAFETY: the address was checked; the value has eight bytes.
        unsafe { std::ptr::copy_nonoverlapping(from, value.as_mut_ptr(), bytes) };
        Ok(u64::from_le_bytes(value))
    }

    fn write(&mut self, thread: &mut Thread, space: Space, at: u64, bytes: usize, value: u64) -> Result<(), Trap> {
        let to = self.address(thread, space, at, bytes)?;
        // SAFETY: the address was checked; the value has eight bytes.
        unsafe { std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), to, bytes) };
        Ok(())
    }

    /// Lets copies arrive until at most `left` closed groups are on their way.
    fn arrive(&mut self, thread: &mut Thread, left: usize) -> Result<(), Trap> {
        while thread.closed.len() > left {
            for (to, from, bytes) in thread.closed.pop_front().unwrap_or_default() {
                let target = self.address(thread, Space::Shared, to, 16)?;
                let mut value = [0u8; 16];
                if bytes > 0 {
                    let size = bytes.min(16);
                    if !from.is_multiple_of(16) {
                        return Err(format!("cp.async from {from:#x}"));
                    }
                    // Both ends are checked, of however many bytes.
                    self.address(thread, Space::Global, from, 1)?;
                    let source = self.address(thread, Space::Global, from + size as u64 - 1, 1)?;
                    // SAFETY: the addresses were checked.
                    unsafe { std::ptr::copy_nonoverlapping(source.wrapping_sub(size - 1), value.as_mut_ptr(), size) };
                }
                // SAFETY: the address was checked.
                unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), target, 16) };
            }
        }
        Ok(())
    }

    /// Runs a thread until it is done or has to meet others.
    fn run(&mut self, thread: &mut Thread) -> Result<(), Trap> {
        let kernel = self.kernel;
        loop {
            let Some(instruction) = kernel.code.get(thread.pc) else { return Err("past the end of the code".into()) };
            if let Some((predicate, negated)) = instruction.guard
                && (thread.registers[predicate as usize] & 1 == 1) == negated
            {
                thread.pc += 1;
                continue;
            }
            let mut next = thread.pc + 1;
            macro_rules! value {
                ($source:expr) => {
                    self.get(thread, $source)
                };
            }
            match &instruction.op {
                Op::Mov(to, from) => thread.registers[*to as usize] = value!(*from),
                Op::Join(to, [low, high], bits) => {
                    let joined = masked(value!(*low), *bits) | value!(*high) << bits;
                    thread.registers[*to as usize] = masked(joined, 2 * bits);
                }
                Op::Split([low, high], from, bits) => {
                    let from = value!(*from);
                    thread.registers[*low as usize] = masked(from, *bits);
                    thread.registers[*high as usize] = masked(from >> bits, *bits);
                }
                Op::Load(space, bytes, is_signed, to, base, offset) => {
                    let at = value!(*base).wrapping_add(*offset as u64);
                    if !at.is_multiple_of(u64::from(*bytes) * to.len() as u64) {
                        return Err(format!("a load of {} x {bytes} bytes from {space:?} {at:#x}", to.len()));
                    }
                    for (i, to) in to.iter().enumerate() {
                        let value = self.read(thread, *space, at + i as u64 * u64::from(*bytes), *bytes as usize)?;
                        let value = if *is_signed { signed(value, 8 * bytes) as u64 } else { value };
                        thread.registers[*to as usize] = value;
                    }
                }
                Op::Store(space, bytes, values, base, offset) => {
                    let at = value!(*base).wrapping_add(*offset as u64);
                    if !at.is_multiple_of(u64::from(*bytes) * values.len() as u64) {
                        return Err(format!("a store of {} x {bytes} bytes to {space:?} {at:#x}", values.len()));
                    }
                    for (i, source) in values.iter().enumerate() {
                        let value = value!(*source);
                        self.write(thread, *space, at + i as u64 * u64::from(*bytes), *bytes as usize, value)?;
                    }
                }
                Op::Arithmetic(op, kind, to, [a, b]) => {
                    thread.registers[*to as usize] = arithmetic(*op, *kind, value!(*a), value!(*b))?;
                }
                Op::MulAdd(kind, wide, to, [a, b, c]) => {
                    let (a, b, c) = (value!(*a), value!(*b), value!(*c));
                    thread.registers[*to as usize] = match kind {
                        Type::F(32) => u64::from(f(a).mul_add(f(b), f(c)).to_bits()),
                        Type::U(bits) | Type::S(bits) => {
                            let op = if *wide { Arithmetic::MulWide } else { Arithmetic::Mul };
                            let product = arithmetic(op, *kind, a, b)?;
                            masked(product.wrapping_add(c), if *wide { 2 * bits } else { *bits })
                        }
                        _ => return Err(format!("mad of {kind:?}")),
                    };
                }
                Op::Select(to, [a, b], p) => {
                    thread.registers[*to as usize] = if value!(*p) & 1 == 1 { value!(*a) } else { value!(*b) };
                }
                Op::Insert(bits, to, [a, b, position, length]) => {
                    let (a, b, at, len) = (value!(*a), value!(*b), value!(*position), value!(*length));
                    let mask = masked(u64::MAX, len as u32) << at;
                    thread.registers[*to as usize] = masked(b & !mask | (a << at) & mask, *bits);
                }
                Op::Set(compare, kind, to, [a, b]) => {
                    let (a, b) = (value!(*a), value!(*b));
                    thread.registers[*to as usize] = u64::from(compared(*compare, *kind, a, b)?);
                }
                Op::Convert(to, from, rounding, register, sources) => {
                    let values: Vec<u64> = sources.iter().map(|&s| value!(s)).collect();
                    thread.registers[*register as usize] = convert(*to, *from, *rounding, &values)?;
                }
                Op::Branch(target) => next = *target,
                Op::Return => {
                    self.arrive(thread, 0)?;
                    thread.status = Status::Done;
                    return Ok(());
                }
                Op::CopyAsync((to, to_offset), (from, from_offset), bytes) => {
                    let to = value!(*to).wrapping_add(*to_offset as u64);
                    let from = value!(*from).wrapping_add(*from_offset as u64);
                    let bytes = value!(*bytes) as usize;
                    // What is not waited for shows up as NaN.
                    let target = self.address(thread, Space::Shared, to, 16)?;
                    // SAFETY: the address was checked.
                    unsafe { target.write_bytes(0xff, 16) };
                    thread.open.push((to, from, bytes));
                }
                Op::Commit => {
                    let group = std::mem::take(&mut thread.open);
                    thread.closed.push_back(group);
                }
                Op::Wait(left) => self.arrive(thread, *left)?,
                Op::Barrier | Op::WarpBarrier | Op::Shuffle(..) | Op::Mma(..) | Op::LoadMatrices(..) => {
                    thread.status = Status::Waiting;
                    return Ok(());
                }
            }
            thread.pc = next;
        }
    }

    /// Does what all threads of a warp have stopped at; nothing where that is a barrier of the block.
    fn together(&mut self, warp: &mut [Thread]) -> Result<bool, Trap> {
        let kernel = self.kernel;
        let pc = warp.iter().find(|t| t.status == Status::Waiting).map_or(0, |t| t.pc);
        let op = &kernel.code[pc].op;
        if matches!(op, Op::Barrier) {
            return Ok(false);
        }
        if warp.len() != 32 || warp.iter().any(|t| t.pc != pc || t.status != Status::Waiting) {
            return Err(format!("the threads of a warp meet at different instructions than {op:?}"));
        }
        match op {
            Op::Shuffle(to, value, mask) => {
                let values: Vec<u64> = warp.iter().map(|t| self.get(t, *value)).collect();
                for (lane, thread) in warp.iter_mut().enumerate() {
                    let other = lane ^ self.get(thread, *mask) as usize;
                    thread.registers[*to as usize] = values[other % 32];
                }
            }
            Op::LoadMatrices(transposed, to, base, offset) => {
                for (matrix, to) in to.iter().enumerate() {
                    let mut values = [[0u64; 8]; 8];
                    for (row, values) in values.iter_mut().enumerate() {
                        let lane = &mut warp[8 * matrix + row];
                        let at = self.get(lane, *base).wrapping_add(*offset as u64);
                        if !at.is_multiple_of(16) {
                            return Err(format!("ldmatrix of a row at {at:#x}"));
                        }
                        for (col, value) in values.iter_mut().enumerate() {
                            *value = self.read(lane, Space::Shared, at + 2 * col as u64, 2)?;
                        }
                    }
                    for (lane, thread) in warp.iter_mut().enumerate() {
                        let (row, col) = (lane / 4, lane % 4 * 2);
                        let [low, high] =
                            [col, col + 1].map(|col| if *transposed { values[col][row] } else { values[row][col] });
                        thread.registers[*to as usize] = low | high << 16;
                    }
                }
            }
            Op::Mma(kind, d, a, b, c) => {
                let widen = |bits: u64| match kind {
                    Type::Bf16 => f32::from_bits((bits as u32 & 0xffff) << 16),
                    _ => f16::from_bits(bits as u16).to_f32(),
                };
                let (mut left, mut right) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
                for (lane, thread) in warp.iter().enumerate() {
                    let (row, col) = (lane / 4, lane % 4 * 2);
                    for (i, &source) in a.iter().enumerate() {
                        let bits = self.get(thread, source);
                        let (row, col) = (row + i % 2 * 8, col + i / 2 * 8);
                        (left[row][col], left[row][col + 1]) = (widen(bits), widen(bits >> 16));
                    }
                    for (i, &source) in b.iter().enumerate() {
                        let bits = self.get(thread, source);
                        (right[col + 8 * i][row], right[col + 8 * i + 1][row]) = (widen(bits), widen(bits >> 16));
                    }
                }
                for (lane, thread) in warp.iter_mut().enumerate() {
                    for i in 0..4 {
                        let (row, col) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
                        let mut sum = f64::from(f(self.get(thread, c[i])));
                        for k in 0..16 {
                            sum += f64::from(left[row][k]) * f64::from(right[k][col]);
                        }
                        thread.registers[d[i] as usize] = u64::from((sum as f32).to_bits());
                    }
                }
            }
            _ => {}
        }
        for thread in warp {
            thread.pc = pc + 1;
            thread.status = Status::Running;
        }
        Ok(true)
    }

    fn finish(&mut self, threads: &mut [Thread]) -> Result<(), Trap> {
        for thread in threads.iter_mut() {
            thread.registers.fill(0);
            (thread.pc, thread.status) = (0, Status::Running);
        }
        loop {
            for warp in threads.chunks_mut(32) {
                loop {
                    for thread in warp.iter_mut().filter(|t| t.status == Status::Running) {
                        let at = self.at;
                        self.run(thread).map_err(|trap| format!("block {at:?}, thread {}: {trap}", thread.index))?;
                    }
                    // Threads that are done take no part: only a full warp meets at what is not the block's barrier.
                    let waiting = warp.iter().any(|t| t.status == Status::Waiting);
                    if !waiting || !self.together(warp)? {
                        break;
                    }
                }
            }
            let mut waiting = threads.iter_mut().filter(|t| t.status == Status::Waiting).peekable();
            let Some(first) = waiting.peek() else { return Ok(()) };
            let pc = first.pc;
            for thread in waiting {
                if thread.pc != pc {
                    return Err("the threads of a block meet at different barriers".into());
                }
                thread.pc += 1;
                thread.status = Status::Running;
            }
            if threads.iter().any(|t| t.status == Status::Done) {
                return Err("a barrier that some threads of the block never reach".into());
            }
        }
    }
}

/// Runs a kernel on all blocks.
pub(crate) fn launch(
    kernel: &Kernel,
    parameter: &[u8],
    grid: [u32; 3],
    threads: u32,
    dynamic: usize,
    memory: &Allocations,
) -> Result<(), Trap> {
    let new = |index| Thread {
        registers: vec![0; kernel.registers],
        pc: 0,
        status: Status::Running,
        index,
        closed: VecDeque::new(),
        open: Vec::new(),
        last: (0, 0),
    };
    let mut all: Vec<Thread> = (0..threads).map(new).collect();
    for z in 0..grid[2] {
        for y in 0..grid[1] {
            for x in 0..grid[0] {
                let shared = vec![0xff; kernel.shared + dynamic];
                let mut block = Block { kernel, parameter, memory, shared, at: [x, y, z], grid, threads };
                block.finish(&mut all)?;
            }
        }
    }
    Ok(())
}

fn arithmetic(op: Arithmetic, kind: Type, a: u64, b: u64) -> Result<u64, Trap> {
    use Arithmetic as A;
    if kind == Type::F(32) {
        let (a, b) = (f(a), f(b));
        let nan = a.is_nan() || b.is_nan();
        let value = match op {
            A::Add => a + b,
            A::Sub => a - b,
            A::Mul => a * b,
            A::Div => a / b,
            A::MinNan | A::MaxNan if nan => f32::NAN,
            A::Min | A::MinNan => a.min(b),
            A::Max | A::MaxNan => a.max(b),
            A::Neg => -a,
            A::Abs => a.abs(),
            A::Sqrt => a.sqrt(),
            A::Rcp => 1.0 / a,
            A::Exp2 => a.exp2(),
            A::Log2 => a.log2(),
            _ => return Err(format!("{op:?} of {kind:?}")),
        };
        return Ok(value.to_bits().into());
    }
    let bits = kind.bits();
    let is_signed = matches!(kind, Type::S(_));
    let (a, b) = (masked(a, bits), if matches!(op, A::Shl | A::Shr) { b & 0xffff_ffff } else { masked(b, bits) });
    let wide = |v: u64| if is_signed { i128::from(signed(v, bits)) } else { i128::from(v) };
    let value = match op {
        A::Add => a.wrapping_add(b),
        A::Sub => a.wrapping_sub(b),
        A::Mul => a.wrapping_mul(b),
        A::MulHigh => ((wide(a) * wide(b)) >> bits) as u64,
        A::MulWide => return Ok(masked((wide(a) * wide(b)) as u64, 2 * bits)),
        A::Div | A::Rem if b == 0 => return Err("a division by zero".into()),
        A::Div => (wide(a) / wide(b)) as u64,
        A::Rem => (wide(a) % wide(b)) as u64,
        A::Min => wide(a).min(wide(b)) as u64,
        A::Max => wide(a).max(wide(b)) as u64,
        A::And => a & b,
        A::Or => a | b,
        A::Xor => a ^ b,
        A::Shl if b >= u64::from(bits) => 0,
        A::Shl => a << b,
        A::Shr if is_signed => (signed(a, bits) >> b.min(63)) as u64,
        A::Shr if b >= u64::from(bits) => 0,
        A::Shr => a >> b,
        A::Not => !a,
        A::Neg => a.wrapping_neg(),
        _ => return Err(format!("{op:?} of {kind:?}")),
    };
    Ok(masked(value, bits))
}

fn compared(compare: Compare, kind: Type, a: u64, b: u64) -> Result<bool, Trap> {
    let order = match kind {
        Type::F(32) => f(a).partial_cmp(&f(b)),
        Type::S(bits) => Some(signed(a, bits).cmp(&signed(b, bits))),
        Type::U(bits) | Type::B(bits) => Some(masked(a, bits).cmp(&masked(b, bits))),
        _ => return Err(format!("a comparison of {kind:?}")),
    };
    let Some(order) = order else { return Ok(matches!(compare, Compare::Unordered(_))) };
    let compare = if let Compare::Unordered(inner) = compare { *inner } else { compare };
    Ok(match compare {
        Compare::Eq => order.is_eq(),
        Compare::Ne => order.is_ne(),
        Compare::Lt => order.is_lt(),
        Compare::Le => order.is_le(),
        Compare::Gt => order.is_gt(),
        Compare::Ge => order.is_ge(),
        Compare::Unordered(_) => return Err("a nested comparison".into()),
    })
}

fn convert(to: Type, from: Type, rounding: Option<Rounding>, values: &[u64]) -> Result<u64, Trap> {
    let refuse = || Err(format!("a conversion from {from:?} to {to:?} by {rounding:?}"));
    let narrow_bf16 = |v: f32| u64::from(bf16::from_f32(v).to_bits());
    let narrow_f16 = |v: f32| u64::from(f16::from_f32(v).to_bits());
    if let (Type::Bf16x2 | Type::F16x2, Type::F(32), &[high, low]) = (to, from, values) {
        let narrow = |v: u64| if to == Type::Bf16x2 { narrow_bf16(f(v)) } else { narrow_f16(f(v)) };
        return Ok(narrow(high) << 16 | narrow(low));
    }
    let &[value] = values else { return refuse() };
    Ok(match (to, from, rounding) {
        (Type::Bf16, Type::F(32), Some(Rounding::Nearest)) => narrow_bf16(f(value)),
        (Type::F(16), Type::F(32), Some(Rounding::Nearest)) => narrow_f16(f(value)),
        (Type::F(32), Type::F(16), None) => f16::from_bits(value as u16).to_f32().to_bits().into(),
        (Type::F(32), Type::F(64), Some(Rounding::Nearest)) => (f64::from_bits(value) as f32).to_bits().into(),
        (Type::F(64), Type::F(32), None) => f64::from(f(value)).to_bits(),
        (Type::F(32), Type::F(32), Some(Rounding::NearestInteger)) => f(value).round_ties_even().to_bits().into(),
        (Type::F(32), Type::F(32), Some(Rounding::ZeroInteger)) => f(value).trunc().to_bits().into(),
        (Type::F(32), Type::S(32), Some(Rounding::Nearest)) => (value as i32 as f32).to_bits().into(),
        (Type::F(32), Type::U(32), Some(Rounding::Nearest)) => (value as u32 as f32).to_bits().into(),
        (Type::S(32), Type::F(32), Some(Rounding::ZeroInteger)) => u64::from(f(value) as i32 as u32),
        (Type::U(32), Type::F(32), Some(Rounding::ZeroInteger)) => u64::from(f(value) as u32),
        (Type::S(to) | Type::U(to), Type::S(from), None) => masked(signed(value, from) as u64, to),
        (Type::S(to) | Type::U(to), Type::U(from), None) => masked(masked(value, from), to),
        _ => return refuse(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Module;

    /// Runs a body on one block of 64 threads, with a word of output each.
    fn run(body: &str) -> Result<Vec<u32>, Trap> {
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry kernel(.param .align 8 .b8 args[8])\n\
             .maxntid 64, 1, 1\n{{\n.shared .align 16 .b8 parts[1024];\nld.param.u64 %d0, [args+0];\n\
             mov.u32 %r0, %tid.x;\nmul.wide.u32 %d1, %r0, 4;\nadd.u64 %d2, %d0, %d1;\n{body}\nret;\n}}\n"
        );
        let module = Module::parse(&text)?;
        let mut out = vec![0u32; 64];
        let address = out.as_mut_ptr() as u64;
        let memory = Allocations::from([(address, 256)]);
        launch(&module.kernels["kernel"], &address.to_le_bytes(), [1, 1, 1], 64, 0, &memory)?;
        Ok(out)
    }

    #[test]
    fn threads_write_and_meet() {
        let reversed = "mad.lo.u32 %r1, %r0, 4, 0;\nst.shared.u32 [%r1], %r0;\nbar.sync 0;\nsub.u32 %r2, 252, %r1;\n\
                        ld.shared.u32 %r3, [%r2];\nst.global.u32 [%d2], %r3;";
        assert_eq!(run(reversed).unwrap(), (0..64).rev().collect::<Vec<u32>>());
        let shuffled = "shfl.sync.bfly.b32 %r1|%p0, %r0, 1, 31, -1;\nst.global.u32 [%d2], %r1;";
        assert_eq!(run(shuffled).unwrap(), (0..64).map(|i| i ^ 1).collect::<Vec<u32>>());
    }

    #[test]
    fn mistakes_are_told() {
        let cases = [
            ("st.global.u32 [%d2+256], %r0;", "past a block"),
            ("st.global.u32 [%d2+-4096], %r0;", "global address"),
            ("st.global.u32 [%d2+2], %r0;", "store of 1 x 4"),
            ("st.shared.u32 [%r0+1024], %r0;", "Shared"),
            ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d2];", "load of 4 x 4"),
            ("setp.lt.u32 %p0, %r0, 3;\n@%p0 bra SKIP;\nbar.sync 0;\nSKIP:", "never reach"),
            ("setp.lt.u32 %p0, %r0, 3;\n@%p0 bra SKIP;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\nSKIP:", "a warp meet"),
            ("red.global.add.f32 [%d2], 0f00000000;", "no such instruction"),
        ];
        for (body, told) in cases {
            let error = run(body).unwrap_err();
            assert!(error.contains(told), "{body}: {error}");
        }
    }

    #[test]
    fn a_copy_arrives_when_it_is_waited_for() {
        let copy = |wait: &str| {
            run(&format!(
                "st.global.u32 [%d2], %r0;\nbar.sync 0;\nsetp.ge.u32 %p0, %r0, 1;\n@%p0 bra DONE;\nmov.u32 %r1, parts;\n\
                 cp.async.cg.shared.global [%r1], [%d0], 16, 8;\ncp.async.commit_group;\n{wait}\n\
                 ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [%r1];\nst.global.v4.u32 [%d0], {{%r5, %r4, %r3, %r2}};\nDONE:"
            ))
            .unwrap()[..4]
                .to_vec()
        };
        assert_eq!(copy("cp.async.wait_group 0;"), [0, 0, 1, 0]);
        assert_eq!(copy(""), [u32::MAX; 4]);
    }
}
