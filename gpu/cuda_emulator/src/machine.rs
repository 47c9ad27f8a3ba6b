//! Runs a kernel: block after block, warp after warp. The threads of a warp that are at one instruction run it together.

use std::collections::{BTreeMap, VecDeque};

use half::f16;

use crate::arithmetic::{arithmetic_of_lanes, compared, convert, f, fused, lanes, masked, signed};
use crate::parse::{Arithmetic, Kernel, Op, Source, Space, Type};
use crate::shared::Shared;

/// Why a kernel stopped.
pub(crate) type Trap = String;

/// Blocks of device memory: first address and size.
pub(crate) type Allocations = BTreeMap<u64, usize>;

/// A number for each thread of a warp.
pub(crate) type Lanes = [u64; 32];

/// `cp.async` copies of a thread on their way: those of closed groups, and of the open one.
#[derive(Clone, Default)]
struct Copies {
    closed: VecDeque<Vec<(u64, u64, usize)>>,
    open: Vec<(u64, u64, usize)>,
}

struct Warp {
    /// Its first thread, and a mask of all.
    first: u32,
    all: u32,
    registers: Vec<Lanes>,
    pc: [usize; 32],
    /// Those that run; those that are at an instruction that the warp or the block does together; the others are done.
    running: u32,
    waiting: u32,
    copies: Vec<Copies>,
    /// The block of memory that was used last.
    last: (u64, u64),
}

impl Warp {
    fn new(first: u32, threads: u32, registers: usize) -> Self {
        Self {
            first,
            all: u32::MAX >> (32 - threads),
            registers: vec![[0; 32]; registers],
            pc: [0; 32],
            running: 0,
            waiting: 0,
            copies: vec![Copies::default(); 32],
            last: (0, 0),
        }
    }

    fn put(&mut self, register: u32, active: u32, values: Lanes) {
        let to = &mut self.registers[register as usize];
        if active == u32::MAX {
            *to = values;
        } else {
            lanes(active).for_each(|lane| to[lane] = values[lane]);
        }
    }

    fn go(&mut self, mask: u32, pc: usize) {
        lanes(mask).for_each(|lane| self.pc[lane] = pc);
    }

    /// The threads that are furthest behind, and where.
    fn next(&self) -> Option<(usize, u32)> {
        let pc = lanes(self.running).map(|lane| self.pc[lane]).min()?;
        let mask = lanes(self.running).filter(|&lane| self.pc[lane] == pc).fold(0, |mask, lane| mask | 1 << lane);
        Some((pc, mask))
    }
}

fn is_aligned(space: Space, at: u64, bytes: usize) -> Result<(), Trap> {
    if at.is_multiple_of(bytes as u64) {
        return Ok(());
    }
    Err(format!("{space:?} address {at:#x} is no multiple of {bytes}"))
}

struct Block<'a> {
    kernel: &'a Kernel,
    parameter: &'a [u8],
    memory: &'a Allocations,
    shared: Shared,
    at: [u32; 3],
    grid: [u32; 3],
    threads: u32,
}

impl Block<'_> {
    fn get(&self, warp: &Warp, source: Source) -> Lanes {
        let same = |value: u32| [u64::from(value); 32];
        match source {
            Source::Register(r) => warp.registers[r as usize],
            Source::Immediate(v) => [v; 32],
            Source::Special(0) => std::array::from_fn(|lane| u64::from(warp.first) + lane as u64),
            Source::Special(3) => same(self.threads),
            Source::Special(i @ 6..=8) => same(self.at[i as usize - 6]),
            Source::Special(i @ 9..=11) => same(self.grid[i as usize - 9]),
            Source::Special(4 | 5) => same(1),
            Source::Special(12) => std::array::from_fn(|lane| lane as u64),
            Source::Special(_) => same(0),
        }
    }

    /// Reads `out.len()` bytes, from a multiple of that.
    fn read(&mut self, warp: &mut Warp, space: Space, at: u64, out: &mut [u8]) -> Result<(), Trap> {
        is_aligned(space, at, out.len())?;
        let from = match space {
            Space::Param => {
                let end = at.saturating_add(out.len() as u64);
                let bytes = self.parameter.get(at as usize..end as usize);
                bytes.ok_or_else(|| format!("Param address {at:#x} is past the end"))?
            }
            Space::Shared => self.shared.read(warp.first / 32, at, out.len())?,
            Space::Global => {
                self.global(&mut warp.last, at, out.len())?;
                // SAFETY: the address was checked; the driver's memory lives as long as the launch.
                unsafe { std::slice::from_raw_parts(at as *const u8, out.len()) }
            }
        };
        out.copy_from_slice(from);
        Ok(())
    }

    /// Writes bytes, to a multiple of their number.
    fn write(&mut self, warp: &mut Warp, space: Space, at: u64, bytes: &[u8]) -> Result<(), Trap> {
        is_aligned(space, at, bytes.len())?;
        match space {
            Space::Param => return Err("a store to the parameters".into()),
            Space::Shared => self.shared.write(warp.first / 32, at, bytes.len())?.copy_from_slice(bytes),
            Space::Global => {
                self.global(&mut warp.last, at, bytes.len())?;
                // SAFETY: the address was checked; nobody else runs while a kernel does.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
            }
        }
        Ok(())
    }

    /// Whether bytes of global memory lie in one block of it.
    fn global(&self, last: &mut (u64, u64), at: u64, bytes: usize) -> Result<(), Trap> {
        let end = at.checked_add(bytes as u64).ok_or("an address past the end")?;
        if at < last.0 || end > last.1 {
            let block = self.memory.range(..=at).next_back();
            let (&start, &size) = block.ok_or_else(|| format!("global address {at:#x} is nobody's"))?;
            if end > start + size as u64 {
                let past = end - start - size as u64;
                return Err(format!("global address {at:#x} is {past} bytes past a block"));
            }
            *last = (start, start + size as u64);
        }
        Ok(())
    }

    /// Lets copies of a thread arrive until at most `left` closed groups are on their way.
    fn arrive(&mut self, warp: &mut Warp, lane: usize, left: usize) -> Result<(), Trap> {
        while warp.copies[lane].closed.len() > left {
            for (to, from, bytes) in warp.copies[lane].closed.pop_front().unwrap_or_default() {
                let mut value = [0u8; 16];
                if bytes > 0 {
                    let size = bytes.min(16);
                    is_aligned(Space::Global, from, 16)?;
                    self.global(&mut warp.last, from, size)?;
                    // SAFETY: the address was checked.
                    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, value.as_mut_ptr(), size) };
                }
                self.write(warp, Space::Shared, to, &value)?;
            }
        }
        Ok(())
    }

    /// What one instruction does that neither branches nor meets, on the active threads. A failure names its lane.
    fn execute(&mut self, warp: &mut Warp, op: &Op, active: u32) -> Result<(), (usize, Trap)> {
        let first = active.trailing_zeros() as usize;
        macro_rules! value {
            ($source:expr) => {
                self.get(warp, $source)
            };
        }
        match op {
            Op::Mov(to, from) => warp.put(*to, active, value!(*from)),
            Op::Join(to, [low, high], bits) => {
                let (low, high) = (value!(*low), value!(*high));
                let joined = |lane| masked(masked(low[lane], *bits) | high[lane] << bits, 2 * bits);
                warp.put(*to, active, std::array::from_fn(joined));
            }
            Op::Split([low, high], from, bits) => {
                let from = value!(*from);
                warp.put(*low, active, from.map(|v| masked(v, *bits)));
                warp.put(*high, active, from.map(|v| masked(v >> bits, *bits)));
            }
            Op::Load(space, bytes, is_signed, to, base, offset) => {
                let base = value!(*base);
                let (size, whole) = (*bytes as usize, *bytes as usize * to.len());
                let mut read = [0; 32];
                for lane in lanes(active) {
                    let at = base[lane].wrapping_add(*offset as u64);
                    self.read(warp, *space, at, &mut read[..whole]).map_err(|e| (lane, e))?;
                    for (to, part) in to.iter().zip(read.chunks_exact(size)) {
                        let mut value = [0; 8];
                        value[..size].copy_from_slice(part);
                        let value = u64::from_le_bytes(value);
                        let value = if *is_signed { signed(value, 8 * bytes) as u64 } else { value };
                        warp.registers[*to as usize][lane] = value;
                    }
                }
            }
            Op::Store(space, bytes, values, base, offset) => {
                let base = value!(*base);
                let (size, whole) = (*bytes as usize, *bytes as usize * values.len());
                let mut written = [0; 32];
                for lane in lanes(active) {
                    for (part, source) in written.chunks_exact_mut(size).zip(values) {
                        let value = match source {
                            Source::Register(r) => warp.registers[*r as usize][lane],
                            source => value!(*source)[lane],
                        };
                        part.copy_from_slice(&value.to_le_bytes()[..size]);
                    }
                    let at = base[lane].wrapping_add(*offset as u64);
                    self.write(warp, *space, at, &written[..whole]).map_err(|e| (lane, e))?;
                }
            }
            Op::Arithmetic(op, kind, to, [a, b]) => {
                let values = arithmetic_of_lanes(*op, *kind, &value!(*a), &value!(*b), active);
                warp.put(*to, active, values.map_err(|e| (first, e))?);
            }
            Op::MulAdd(kind, wide, to, [a, b, c]) => {
                let (a, b, c) = (value!(*a), value!(*b), value!(*c));
                let values = match kind {
                    Type::F(32) => fused(&a, &b, &c),
                    Type::U(bits) | Type::S(bits) => {
                        let op = if *wide { Arithmetic::MulWide } else { Arithmetic::Mul };
                        let product = arithmetic_of_lanes(op, *kind, &a, &b, active).map_err(|e| (first, e))?;
                        let bits = if *wide { 2 * bits } else { *bits };
                        std::array::from_fn(|lane| masked(product[lane].wrapping_add(c[lane]), bits))
                    }
                    _ => return Err((first, format!("mad of {kind:?}"))),
                };
                warp.put(*to, active, values);
            }
            Op::Select(to, [a, b], p) => {
                let (a, b, p) = (value!(*a), value!(*b), value!(*p));
                let select = |lane| if p[lane] & 1 == 1 { a[lane] } else { b[lane] };
                warp.put(*to, active, std::array::from_fn(select));
            }
            Op::Insert(bits, to, [a, b, position, length]) => {
                let (a, b, at, len) = (value!(*a), value!(*b), value!(*position), value!(*length));
                let insert = |lane: usize| {
                    let mask = masked(u64::MAX, len[lane] as u32) << at[lane];
                    masked(b[lane] & !mask | (a[lane] << at[lane]) & mask, *bits)
                };
                warp.put(
                    *to,
                    active,
                    std::array::from_fn(|lane| if active >> lane & 1 == 1 { insert(lane) } else { 0 }),
                );
            }
            Op::Set(compare, kind, to, [a, b]) => {
                let (a, b) = (value!(*a), value!(*b));
                let mut values = [0; 32];
                for lane in lanes(active) {
                    values[lane] = compared(*compare, *kind, a[lane], b[lane]).map_err(|e| (lane, e))?.into();
                }
                warp.put(*to, active, values);
            }
            Op::Convert(to, from, rounding, register, sources) => {
                let sources: Vec<Lanes> = sources.iter().map(|&s| value!(s)).collect();
                let mut values = [0; 32];
                for lane in lanes(active) {
                    let of = match &sources[..] {
                        [one] => convert(*to, *from, *rounding, &[one[lane]]),
                        [one, other] => convert(*to, *from, *rounding, &[one[lane], other[lane]]),
                        _ => Err("a conversion of more than two numbers".into()),
                    };
                    values[lane] = of.map_err(|e| (lane, e))?;
                }
                warp.put(*register, active, values);
            }
            Op::CopyAsync((to, to_offset), (from, from_offset), bytes) => {
                let (to, from, bytes) = (value!(*to), value!(*from), value!(*bytes));
                for lane in lanes(active) {
                    let to = to[lane].wrapping_add(*to_offset as u64);
                    // What is not waited for shows up as NaN.
                    self.write(warp, Space::Shared, to, &[0xff; 16]).map_err(|e| (lane, e))?;
                    let from = from[lane].wrapping_add(*from_offset as u64);
                    warp.copies[lane].open.push((to, from, bytes[lane] as usize));
                }
            }
            Op::Commit => lanes(active).for_each(|lane| {
                let copies = &mut warp.copies[lane];
                copies.closed.push_back(std::mem::take(&mut copies.open));
            }),
            Op::Wait(left) => {
                for lane in lanes(active) {
                    self.arrive(warp, lane, *left).map_err(|e| (lane, e))?;
                }
            }
            _ => return Err((first, format!("{op:?} is run elsewhere"))),
        }
        Ok(())
    }

    /// Runs the threads of a warp until each is done or has to meet others.
    fn run(&mut self, warp: &mut Warp) -> Result<(), (usize, Trap)> {
        let kernel = self.kernel;
        while let Some((mut pc, mut mask)) = warp.next() {
            // Threads ahead are met again further down.
            let split = warp.running != mask;
            loop {
                let Some(instruction) = kernel.code.get(pc) else {
                    return Err((mask.trailing_zeros() as usize, "past the end of the code".into()));
                };
                let active = match instruction.guard {
                    None => mask,
                    Some((predicate, negated)) => {
                        let values = &warp.registers[predicate as usize];
                        lanes(mask).filter(|&l| (values[l] & 1 == 1) != negated).fold(0, |mask, l| mask | 1 << l)
                    }
                };
                let mut next = pc + 1;
                match &instruction.op {
                    _ if active == 0 => {}
                    Op::Branch(target) if active == mask => next = *target,
                    Op::Branch(target) => {
                        warp.go(active, *target);
                        warp.go(mask & !active, next);
                        break;
                    }
                    op @ (Op::Return
                    | Op::Barrier
                    | Op::WarpBarrier
                    | Op::Shuffle(..)
                    | Op::Mma(..)
                    | Op::LoadMatrices(..)) => {
                        warp.running &= !active;
                        if matches!(op, Op::Return) {
                            for lane in lanes(active) {
                                self.arrive(warp, lane, 0).map_err(|e| (lane, e))?;
                            }
                        } else {
                            warp.waiting |= active;
                            warp.go(active, pc);
                        }
                        mask &= !active;
                    }
                    op => self.execute(warp, op, active)?,
                }
                if mask == 0 {
                    break;
                }
                pc = next;
                if split {
                    warp.go(mask, pc);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Does what all threads of a warp have stopped at; nothing where that is a barrier of the block.
    fn together(&mut self, warp: &mut Warp) -> Result<bool, Trap> {
        let kernel = self.kernel;
        let pc = warp.pc[warp.waiting.trailing_zeros() as usize];
        let op = &kernel.code[pc].op;
        if matches!(op, Op::Barrier) {
            return Ok(false);
        }
        if warp.waiting != u32::MAX || warp.pc.iter().any(|p| *p != pc) {
            return Err(format!("the threads of a warp meet at different instructions than {op:?}"));
        }
        match op {
            Op::Shuffle(to, value, mask) => {
                let (values, mask) = (self.get(warp, *value), self.get(warp, *mask));
                warp.registers[*to as usize] = std::array::from_fn(|lane| values[(lane ^ mask[lane] as usize) % 32]);
            }
            Op::LoadMatrices(transposed, to, base, offset) => {
                let base = self.get(warp, *base);
                for (matrix, to) in to.iter().enumerate() {
                    let mut values = [[0u64; 8]; 8];
                    for (row, values) in values.iter_mut().enumerate() {
                        let at = base[8 * matrix + row].wrapping_add(*offset as u64);
                        let mut bytes = [0; 16];
                        self.read(warp, Space::Shared, at, &mut bytes)?;
                        for (value, half) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                            *value = u16::from_le_bytes([half[0], half[1]]).into();
                        }
                    }
                    warp.registers[*to as usize] = std::array::from_fn(|lane| {
                        let (row, col) = (lane / 4, lane % 4 * 2);
                        let [low, high] =
                            [col, col + 1].map(|col| if *transposed { values[col][row] } else { values[row][col] });
                        low | high << 16
                    });
                }
            }
            Op::Mma(kind, d, a, b, c) => {
                let widen = |bits: u64| match kind {
                    Type::Bf16 => f32::from_bits((bits as u32 & 0xffff) << 16),
                    _ => f16::from_bits(bits as u16).to_f32(),
                };
                let (mut left, mut right) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
                for (i, &source) in a.iter().enumerate() {
                    for (lane, bits) in self.get(warp, source).into_iter().enumerate() {
                        let (row, col) = (lane / 4 + i % 2 * 8, lane % 4 * 2 + i / 2 * 8);
                        (left[row][col], left[row][col + 1]) = (widen(bits), widen(bits >> 16));
                    }
                }
                for (i, &source) in b.iter().enumerate() {
                    for (lane, bits) in self.get(warp, source).into_iter().enumerate() {
                        let (row, col) = (lane % 4 * 2 + 8 * i, lane / 4);
                        (right[row][col], right[row + 1][col]) = (widen(bits), widen(bits >> 16));
                    }
                }
                let mut product = [[0f64; 8]; 16];
                for (row, sums) in product.iter_mut().enumerate() {
                    for (k, right) in right.iter().enumerate() {
                        let left = f64::from(left[row][k]);
                        sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * f64::from(*right));
                    }
                }
                let c = c.map(|source| self.get(warp, source));
                for i in 0..4 {
                    warp.registers[d[i] as usize] = std::array::from_fn(|lane| {
                        let (row, col) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
                        u64::from(((f64::from(f(c[i][lane])) + product[row][col]) as f32).to_bits())
                    });
                }
            }
            _ => {}
        }
        warp.pc = [pc + 1; 32];
        (warp.running, warp.waiting) = (warp.all, 0);
        Ok(true)
    }

    fn finish(&mut self, warps: &mut [Warp]) -> Result<(), Trap> {
        for warp in warps.iter_mut() {
            (warp.pc, warp.running, warp.waiting, warp.last) = ([0; 32], warp.all, 0, (0, 0));
        }
        loop {
            for warp in warps.iter_mut() {
                loop {
                    let (at, first) = (self.at, warp.first);
                    self.run(warp)
                        .map_err(|(lane, trap)| format!("block {at:?}, thread {}: {trap}", first + lane as u32))?;
                    // Threads that are done take no part: only a full warp meets at what is not the block's barrier.
                    if warp.waiting == 0 || !self.together(warp)? {
                        break;
                    }
                }
            }
            let at = |warp: &Warp| lanes(warp.waiting).map(|lane| warp.pc[lane]).collect::<Vec<_>>();
            let waiting: Vec<usize> = warps.iter().flat_map(at).collect();
            let Some(&pc) = waiting.first() else { return Ok(()) };
            if waiting.iter().any(|p| *p != pc) {
                return Err("the threads of a block meet at different barriers".into());
            }
            if waiting.len() < self.threads as usize {
                return Err("a barrier that some threads of the block never reach".into());
            }
            self.shared.barrier();
            for warp in warps.iter_mut() {
                (warp.pc, warp.running, warp.waiting) = ([pc + 1; 32], warp.all, 0);
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
    let new = |first: u32| Warp::new(first, (threads - first).min(32), kernel.registers);
    let mut warps: Vec<Warp> = (0..threads).step_by(32).map(new).collect();
    for z in 0..grid[2] {
        for y in 0..grid[1] {
            for x in 0..grid[0] {
                let shared = Shared::new(kernel.shared + dynamic);
                let mut block = Block { kernel, parameter, memory, shared, at: [x, y, z], grid, threads };
                block.finish(&mut warps)?;
            }
        }
    }
    Ok(())
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
    fn threads_go_different_ways_and_come_together() {
        let looped = "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nAGAIN:\nsetp.ge.u32 %p0, %r2, %r0;\n@%p0 bra OUT;\n\
                      add.u32 %r1, %r1, %r2;\nadd.u32 %r2, %r2, 1;\nbra AGAIN;\nOUT:\n\
                      shfl.sync.bfly.b32 %r3|%p1, %r1, 1, 31, -1;\nst.global.u32 [%d2], %r3;";
        let sum = |i: u32| (0..i).sum::<u32>();
        assert_eq!(run(looped).unwrap(), (0..64).map(|i| sum(i ^ 1)).collect::<Vec<u32>>());
        let ended = "setp.lt.u32 %p0, %r0, 5;\n@%p0 ret;\n@!%p0 st.global.u32 [%d2], %r0;";
        assert_eq!(run(ended).unwrap(), (0..64).map(|i| if i < 5 { 0 } else { i }).collect::<Vec<u32>>());
    }

    #[test]
    fn mistakes_are_told() {
        let cases = [
            ("st.global.u32 [%d2+256], %r0;", "past a block"),
            ("st.global.u32 [%d2+-4096], %r0;", "global address"),
            ("st.global.u32 [%d2+2], %r0;", "no multiple of 4"),
            ("st.shared.u32 [%r0+1024], %r0;", "Shared"),
            ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d2];", "no multiple of 16"),
            ("setp.lt.u32 %p0, %r0, 3;\n@%p0 bra SKIP;\nbar.sync 0;\nSKIP:", "never reach"),
            ("setp.lt.u32 %p0, %r0, 3;\n@%p0 bra SKIP;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\nSKIP:", "a warp meet"),
            (
                "mad.lo.u32 %r1, %r0, 4, 0;\nst.shared.u32 [%r1], %r0;\nsub.u32 %r2, 252, %r1;\nld.shared.u32 %r3, [%r2];",
                "a race",
            ),
            (
                "mad.lo.u32 %r1, %r0, 4, 0;\nld.shared.u32 %r3, [%r1];\nsub.u32 %r2, 252, %r1;\nst.shared.u32 [%r2], %r0;",
                "a race",
            ),
            ("mov.u32 %r1, 0;\nst.shared.u32 [%r1], %r0;", "a race"),
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
